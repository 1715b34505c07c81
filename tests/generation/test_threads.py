"""One model in eight threads: every call returns the same as when it runs alone."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import tiny_model, tokens
from torch import Tensor, nn

from open_mythos import KVCache, OpenMythos, tasks
from open_mythos.diagnostics import loop_gain, trace
from open_mythos.evaluation.depth import accuracy_by_loops, measuring
from open_mythos.evaluation.grid import depth_grid
from open_mythos.generation.conversation import Conversation
from open_mythos.generation.sampling import Sampling
from open_mythos.generation.speculative import Draft
from open_mythos.nn.exits import Acceleration, Gate, PredictionKL, StateChange
from open_mythos.tasks.tokenizer import Tokenizer

CALLS = int(os.environ.get("OPEN_MYTHOS_THREAD_CALLS", 6))  # per thread; 100 in the long form
ENGINES = ("auto", "modules", "fused", "native")
EXITS = (None, Gate(0.5), StateChange(0.5), Acceleration(0.5), PredictionKL(1e-3))


def call_of(model: OpenMythos, number: int) -> Callable[[], Tensor]:
    """A call with its own prompt, loops, exit, seed and engine."""
    ids, n_loops, exit = tokens(1 + number % 2, 3 + number % 5, seed=number), 1 + number % 4, EXITS[number % 5]
    engine, kind = ENGINES[number // 2 % 4], number % 7
    exit = exit if engine != "native" or isinstance(exit, Gate | StateChange | None) else None
    sampling, seed = (Sampling(0), Sampling(1.0, 5), Sampling(0.7, None, 0.9))[number % 3], number

    def call() -> Tensor:
        options: dict[str, Any] = dict(n_loops=n_loops, exit=exit, sampling=sampling)
        options["generator"] = torch.Generator().manual_seed(seed)
        if kind == 0:
            with torch.no_grad():
                return model(ids, n_loops, exit=exit)
        if kind == 1:
            with torch.no_grad():
                return model(ids, n_loops, KVCache())
        if kind == 2:
            return torch.stack(list(model.stream(ids, 5, engine=engine, **options)))
        if kind == 3:
            exit_of_many = None if isinstance(exit, PredictionKL) else exit
            return torch.cat(model.generate_many(list(ids), 4, **{**options, "exit": exit_of_many}))
        if kind == 4:
            options |= dict(exit=None, n_loops=3, draft=Draft(1, 2))
            return model.generate(ids, 5, engine="modules", **options)
        return model.generate(ids, 5, engine=engine, **options)

    return call


def in_threads(calls: list[list[Callable[[], Tensor]]]) -> list[list[Any]]:
    """The results of each thread's calls, or the errors that they raise."""
    found: list[list[Any]] = [[] for _ in calls]
    start = threading.Barrier(len(calls))

    def run(mine: list[Callable[[], Tensor]], answers: list[Any]) -> None:
        start.wait()
        for call in mine:
            try:
                answers.append(call())
            except Exception as error:
                answers.append(error)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(calls, found, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def adapted(model: OpenMythos) -> OpenMythos:
    """The model with PEFT adapters that change its outputs."""
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False), model)
    return model


@pytest.mark.parametrize("adapters", [False, True], ids=["plain", "adapters"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_calls_in_eight_threads_return_the_same_as_alone(training: bool, adapters: bool) -> None:
    model = tiny_model(halting=False, dropout=0.3, state_noise=0.1, state_init="noise")
    model = (adapted(model) if adapters else model).train(training)
    numbers = [[100 * thread + i for i in range(CALLS)] for thread in range(8)]
    if adapters:  # not supported by every engine
        numbers = [[n for n in mine if ENGINES[n // 2 % 4] in ("auto", "modules")] for mine in numbers]
    if training:  # a pass in training mode draws noise from the one state that all threads share
        numbers = [[n for n in mine if n % 7 > 1] for mine in numbers]
    calls = [[call_of(model, n) for n in mine] for mine in numbers]
    modes = [module.training for module in model.modules()]
    alone = [[call() for call in mine] for mine in calls]
    together = in_threads(calls)
    assert modes == [module.training for module in model.modules()]
    n_calls = 0
    for mine, theirs in zip(alone, together, strict=True):
        for expected, found in zip(mine, theirs, strict=True):
            assert isinstance(found, Tensor), found
            torch.testing.assert_close(found, expected)
            n_calls += 1
    print(f"{n_calls} calls in 8 threads")


def test_concurrent_generation_does_not_affect_a_training_step() -> None:
    model, ids = tiny_model(halting=True, act_threshold=0.5).train(), tokens(4, 9)
    expected, done = model(ids, auxiliary=False).detach(), threading.Event()

    def generate() -> None:
        while not done.is_set():
            model.generate(tokens(1, 3), 3)

    beside = threading.Thread(target=generate)
    beside.start()
    try:
        for _ in range(20):
            torch.testing.assert_close(model(ids, auxiliary=False).detach(), expected, rtol=0, atol=0)
    finally:
        done.set()
        beside.join()


def test_concurrent_measurements_and_a_training_step_do_not_affect_each_other() -> None:
    model, ids, prompt = tiny_model(halting=False, vocab_size=257).train(), tokens(4, 9), tokens(1, 6)
    talk = Conversation(model, Tokenizer(True), 2)
    talk.ids = [1, 2, 3]
    measures: list[Callable[[], Any]] = [
        lambda: trace(model, prompt, 3), lambda: accuracy_by_loops(model, prompt, prompt, [1, 3]),
        lambda: talk.trace(2), lambda: loop_gain(model, prompt, 2, 3),
    ]  # fmt: skip
    expected = [measure() for measure in measures]
    step, done, found = model(ids, auxiliary=False).detach(), threading.Event(), list[Any]()

    def keep_measuring() -> None:
        while not done.is_set():
            found.append([measure() for measure in measures])

    beside = threading.Thread(target=keep_measuring)
    beside.start()
    try:
        while len(found) < 3 and beside.is_alive():
            assert all(module.training for module in model.modules())
            torch.testing.assert_close(model(ids, auxiliary=False).detach(), step, rtol=0, atol=0)
    finally:
        done.set()
        beside.join()
    for again in found:
        torch.testing.assert_close([*vars(again[0]).values()], [*vars(expected[0]).values()])
        assert again[1] == expected[1] and again[3] == pytest.approx(expected[3])
        assert again[2][0] == expected[2][0]
        torch.testing.assert_close(again[2][1:], expected[2][1:])  # rounding may differ while other threads run
    assert len(found) >= 3


def test_evaluating_with_other_halting_does_not_affect_other_calls() -> None:
    model, ids, task = tiny_model(halting=True, act_threshold=0.5, vocab_size=257), tokens(2, 9), tasks.load("parity")
    with torch.no_grad():
        alone = model(ids, 6)
        model.cfg.halting = False
        assert (model(ids, 6) - alone).abs().max() > 1e-4
        model.cfg.halting = True
        expected = depth_grid(model, task, [8], [1, 6], 4, halting=False).accuracy
        with measuring(model, halting=False) as still, measuring(still, act_threshold=0.9) as other:
            assert (model.cfg.halting, model.cfg.act_threshold) == (True, 0.5)
            assert (other.cfg.halting, other.cfg.act_threshold) == (False, 0.9)
            torch.testing.assert_close(model(ids, 6), alone, rtol=0, atol=0)  # as another thread would call it
            assert torch.equal(depth_grid(model, task, [8], [1, 6], 4, halting=False).accuracy, expected)
            torch.testing.assert_close(model(ids, 6), alone, rtol=0, atol=0)


def test_generation_refuses_foreign_dropout_in_training_mode() -> None:
    model = tiny_model().train()
    model.prelude[0].ffn = nn.Sequential(model.prelude[0].ffn, nn.Dropout(0.5))
    for call in (lambda: model.generate(tokens(1, 3), 2), lambda: model.generate_many([tokens(1, 3)[0]], 2)):
        with pytest.raises(ValueError, match=r"prelude\.0\.ffn\.1 \(Dropout\) is in training mode.*model\.eval\(\)"):
            call()
    model.eval().generate(tokens(1, 3), 2)


def test_a_cache_belongs_to_one_call_at_a_time() -> None:
    model, cache, ids, errors = tiny_model().eval(), KVCache(), tokens(1, 3), list[str]()

    def meanwhile(*_: Any) -> None:
        try:
            model(ids, kv_cache=cache)
        except ValueError as error:
            errors.append(str(error))

    with torch.no_grad():
        hook = model.coda[0].register_forward_hook(lambda *_: in_threads([[meanwhile]]) and None)
        model(ids, kv_cache=cache)
        hook.remove()
        assert len(errors) == 1 and "kv_cache is in use by another call" in errors[0] and cache.length == 3
        model(ids, kv_cache=cache)
