"""Ctrl-C at any line: all state is as before the call, or an error says what is wrong with it."""

from __future__ import annotations

import copy
import linecache
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model, tokens

import open_mythos
from open_mythos import KVCache, OpenMythos
from open_mythos.generation.conversation import Conversation
from open_mythos.generation.depth_batching import DepthBatch
from open_mythos.generation.sampling import Sampling
from open_mythos.nn.exits import Gate
from open_mythos.nn.modes import is_evaluating
from open_mythos.tasks.tokenizer import Tokenizer

PACKAGE = str(Path(open_mythos.__file__).parent)
LINES = int(os.environ.get("OPEN_MYTHOS_INTERRUPTS", 40))  # interrupted in each call
SEED = int(os.environ.get("OPEN_MYTHOS_SEED", 0))


class Interrupted(BaseException):
    """Like KeyboardInterrupt, but raised only here."""


def interrupt_at(call: Callable[[], Any], last: int) -> tuple[bool, int]:
    """Run ``call`` up to the ``last``-th line of the package; whether it got there, and the number of lines begun.

    Lines where a ``with`` block is left do not count: Python checks for signals after ``__exit__``, not before.
    """
    n, at = [0], dict[int, int]()

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE) or frame.f_code.co_name == "_close":  # garbage collection
            return None
        if event == "line":
            before, at[id(frame)] = at.get(id(frame), 0), frame.f_lineno
            words = linecache.getline(frame.f_code.co_filename, frame.f_lineno).split()
            if before > frame.f_lineno and words[:1] == ["with"]:
                return trace
            n[0] += 1
            if n[0] == last:
                sys.settrace(None)
                raise Interrupted
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interrupted:
        return True, n[0]
    finally:
        sys.settrace(before)
    return False, n[0]


def lines_to_interrupt(call: Callable[[], Any], most: int = LINES) -> list[int]:
    """Numbers of the lines of a call: the first and last few, and some between."""
    n = interrupt_at(call, -1)[1]
    between = random.Random(SEED).sample(range(1, n + 1), min(most, n))
    return sorted({*range(1, min(7, n)), *range(max(1, n - 6), n + 1), *between})


def model() -> OpenMythos:
    return tiny_model(vocab_size=257, halting=True, act_threshold=0.5, max_seq_len=256).eval()


def outer_state(made: OpenMythos, generator: torch.Generator) -> Any:
    return (
        [module.training for module in made.modules()], torch.is_grad_enabled(), torch.get_rng_state().tolist(),
        generator.get_state().tolist(), is_evaluating(), [len(module._forward_hooks) for module in made.modules()],
    )  # fmt: skip


@pytest.mark.parametrize("way", ["generate", "engine", "stream", "generate_many", "draft", "given"])
def test_interrupted_generation_leaves_modes_gradients_and_random_state(way: str) -> None:
    made, ids, generator = model().train(), tokens(1, 4), torch.Generator().manual_seed(0)

    def call() -> Any:
        if way == "generate_many":
            return made.generate_many([ids[0], ids[0, :2]], 2, 2)
        if way == "draft":
            made.cfg.halting = False
            return made.generate(ids, 3, 3, draft_loops=1)
        if way == "given":
            return made.generate(ids, 2, 2, generator=generator, engine="modules")
        if way == "stream":
            return next(made.stream(ids, 2, 2))
        return made.generate(ids, 2, 2, engine="fused" if way == "engine" else "auto")

    for last in lines_to_interrupt(call):
        before = outer_state(made, generator)
        if interrupt_at(call, last)[0]:
            assert outer_state(made, generator) == before, f"line {last}"


@pytest.mark.parametrize("make", [KVCache, dict, lambda: KVCache(2)], ids=["KVCache", "dict", "shared slots"])
@pytest.mark.parametrize("n_new", [1, 5, 70])
def test_after_an_interrupt_a_cache_is_as_before_or_refused(make: Callable[[], Any], n_new: int) -> None:
    made, ids, more, then = model(), tokens(1, 6), tokens(1, n_new, seed=1), tokens(1, 2, seed=2)
    exit = Gate(0.3) if make is KVCache else None
    with torch.no_grad():
        filled = make()
        made(ids, 3, filled, exit=exit)
        expected, refused = made(then, 3, copy.deepcopy(filled), exit=exit), 0
        caches = iter(lambda: copy.deepcopy(filled), None)
        for last in lines_to_interrupt(lambda: made(more, 3, next(caches), exit=exit)):
            cache = next(caches)
            if not interrupt_at(lambda cache=cache: made(more, 3, cache, exit=exit), last)[0]:
                continue
            try:
                torch.testing.assert_close(made(then, 3, cache, exit=exit), expected)
            except ValueError as error:
                assert "kv_cache is in use by another call" in str(error), f"line {last}"
                refused += 1
    assert refused <= 3


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_interrupted_turn_is_not_part_of_the_conversation(temperature: float) -> None:
    made = model()

    def start_conversation() -> Conversation:
        talk = Conversation(made, Tokenizer(True), 2, Sampling(temperature))
        "".join(talk.reply("hello", 3))
        return talk

    other = start_conversation()
    for last in lines_to_interrupt(lambda: "".join(other.reply("more", 3))):
        torch.manual_seed(last)
        talk = start_conversation()
        before, state = (copy.deepcopy(talk.messages), list(talk.ids)), torch.get_rng_state()
        twin = copy.deepcopy((talk.messages, talk.ids))
        if not interrupt_at(lambda talk=talk: "".join(talk.reply("more", 3)), last)[0]:
            continue
        assert (talk.messages, talk.ids) == before and torch.equal(torch.get_rng_state(), state), f"line {last}"
        found = "".join(talk.reply("more", 3))
        torch.set_rng_state(state)
        fresh = Conversation(made, Tokenizer(True), 2, Sampling(temperature))
        fresh.messages, fresh.ids = twin
        assert "".join(fresh.reply("more", 3)) == found, f"line {last}"


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_interrupted_depth_batch_loses_no_request(temperature: float) -> None:
    made, prompts = model(), [tokens(1, n, seed=n)[0] for n in (3, 5, 2, 4)]

    def start_batch(n_steps: int) -> tuple[DepthBatch, list[Any]]:
        batch = DepthBatch(made, max_rows=3)
        requests = [
            batch.add(p, 4, 3, Sampling(temperature), generator=torch.Generator().manual_seed(i))
            for i, p in enumerate(prompts)
        ]
        for _ in range(n_steps):
            batch.step()
        return batch, requests

    def finish(batch: DepthBatch) -> None:
        for _ in range(200):
            if not batch.busy:
                return
            batch.step()
        raise AssertionError("requests did not finish")

    for n_steps in (0, 4):
        batch, requests = start_batch(n_steps)
        finish(batch)
        expected = [request.tokens for request in requests]
        for last in lines_to_interrupt(start_batch(n_steps)[0].step, LINES // 4):
            batch, requests = start_batch(n_steps)
            before = [(list(r.tokens), list(r.loops), r.done) for r in requests]
            if not interrupt_at(batch.step, last)[0]:
                continue
            held = {id(r) for r in (*batch._queue, *(row.request for row in (*batch._running, *batch._finished)))}
            assert {id(r) for r in requests if not r.done} <= held, f"line {last}"
            unmoved = [(r.tokens, r.loops, r.done) for r in requests] == before
            finish(batch)
            assert all(r.done and r.error is None for r in requests) and unmoved, f"line {last}"
            assert [r.tokens for r in requests] == expected, f"line {last}"


def test_non_finite_logits_end_only_their_own_request() -> None:
    made = model()
    batch = DepthBatch(made, max_rows=2)
    good, bad = batch.add(tokens(1, 3)[0], 4, sampling=Sampling(0)), batch.add(torch.tensor([200, 7]), 4)
    expected = made.generate(good.prompt.unsqueeze(0), 4, temperature=0)[0, 3:].tolist()
    with torch.no_grad():
        made.embed.weight[200] = float("nan")
    made.head.weight = torch.nn.Parameter(made.head.weight.detach().nan_to_num())  # untied from the embedding
    with pytest.raises(ValueError, match=r"logits after 2 tokens are not finite.*is that of embed"):
        batch.step()
    while batch.busy:
        batch.step()
    assert bad.done and "not finite" in str(bad.error) and good.error is None and good.tokens == expected


@pytest.mark.parametrize("options", [{"temperature": 0}, {}, {"engine": "modules"}, {"draft_loops": 1}])
def test_the_first_layer_with_non_finite_output_is_named(options: dict[str, Any]) -> None:
    made = tiny_model(halting=False).eval()
    with torch.no_grad():
        made.coda[0].ffn.down.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"logits after 3 tokens are not finite.*is that of coda\.0\.ffn\.down"):
        made.generate(tokens(1, 3), 2, **options)
    with torch.no_grad():
        made.recurrent.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"is that of recurrent\.norm in loop 1"):
        made.generate(tokens(1, 3), 2, **options)
    assert not any(module._forward_hooks for module in made.modules())
