"""Depth batching: a sequence's tokens do not depend on what runs in the same batch."""

from typing import Any

import pytest
import torch
from helpers import ATTENTION, loops_used, tiny_model, tokens
from torch import Tensor

from open_mythos import OpenMythos
from open_mythos.generation.depth_batching import DepthBatch
from open_mythos.generation.sampling import Sampling
from open_mythos.model import UnrolledMythos
from open_mythos.nn.exits import Acceleration, Exit, Gate, PredictionKL, StateChange

GREEDY = Sampling(temperature=0)
PROMPTS = [tokens(n, seed=n) for n in (5, 1, 9, 3, 12, 2, 7)]
LOOPS = [4, 7, 1, 6, 2, 5, 7]
EXITS = [None, Gate(0.9), StateChange(0.06), StateChange(0.08, 2), Acceleration(0.05)]


def model_of(attn_type: str = "gqa", **changes: Any) -> OpenMythos:
    return tiny_model(attn_type, max_seq_len=64, **{"halting": False, **changes})


def alone(model: OpenMythos, prompt: Tensor, n_new: int, n_loops: int, exit: Exit | None = None, **options) -> Tensor:
    return model.generate(prompt.unsqueeze(0), n_new, n_loops, temperature=0, exit=exit, **options)[0]


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("exit", EXITS, ids=str)
def test_greedy_tokens_equal_those_of_each_prompt_alone(attn_type, exit):
    """Prompts of every length, each with its own number of loops; with 3 rows, most start while others are running."""
    model = model_of(attn_type)
    expected = [alone(model, prompt, 11, n, exit) for prompt, n in zip(PROMPTS, LOOPS, strict=True)]
    for max_rows in (1, 3, 32):
        together = model.generate_many(PROMPTS, 11, LOOPS, temperature=0, exit=exit, max_rows=max_rows)
        assert all(map(torch.equal, together, expected)), f"max_rows={max_rows}"


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("changes", [
    dict(halting=True), dict(local_share=1.0), dict(local_share=1.0, conv_taps=0, local_window=1), dict(local_window=0),
    dict(prelude_layers=0, coda_layers=0), dict(prelude_layers=2, coda_layers=0), dict(state_init="zero"),
    dict(loop_index_dim=8), dict(loop_index_dim=8, lora_rank=0, state_norm=False),
    dict(n_heads=6, n_kv_heads=3, dim=36), dict(core_layers=2), dict(core_layers=3, n_experts=0, bridge_dim=12),
], ids=str)  # fmt: skip
def test_every_model_option_gives_the_tokens_of_each_prompt_alone(attn_type, changes):
    model = model_of(attn_type, **changes)
    exit = None if changes.get("halting") else StateChange(0.06)
    together = model.generate_many(PROMPTS[:4], 8, LOOPS[:4], temperature=0, exit=exit)
    for prompt, n_loops, found in zip(PROMPTS, LOOPS, together, strict=False):
        assert torch.equal(found, alone(model, prompt, 8, n_loops, exit))


@pytest.mark.parametrize("exit", [StateChange(0.06), Gate(0.9)], ids=str)
def test_each_token_runs_only_the_loops_until_its_exit(exit, monkeypatch):
    model, computed = model_of(), []
    original = model.recurrent.block.ffn.forward
    monkeypatch.setattr(
        model.recurrent.block.ffn, "forward", lambda x: computed.append(x.shape[:-1].numel()) or original(x)
    )
    batch = DepthBatch(model, exit)
    requests = [batch.add(prompt, 9, 7, GREEDY) for prompt in PROMPTS]
    batch.step()  # each prompt is processed by itself
    del computed[:-1]
    while batch.busy:
        batch.step()
    steps, computed_in_all = len(computed), sum(computed)
    for request in requests:
        whole = torch.cat([request.prompt, torch.tensor(request.tokens)]).unsqueeze(0)
        used = loops_used(model, whole, 7, exit=exit)[0]
        assert request.loops == used[len(request.prompt) : -1].tolist()
    needed = [sum(request.loops) for request in requests]
    assert computed_in_all == sum(needed)
    assert max(needed) <= steps < 1.3 * max(needed)


def test_requests_with_few_loops_do_not_wait_for_those_with_many():
    batch = DepthBatch(model_of())
    quick, *slow = [batch.add(prompt, 12, n, GREEDY) for prompt, n in zip(PROMPTS, (1, 7, 7, 7), strict=False)]
    for _ in range(12):
        batch.step()
    assert quick.done and not any(len(request.tokens) > 3 for request in slow)


def test_requests_are_added_and_finish_while_others_run():
    model, exit = model_of(), StateChange(0.06)
    batch = DepthBatch(model, exit, max_rows=2)
    first = batch.add(PROMPTS[0], 20, 7, GREEDY)
    for _ in range(30):
        batch.step()
    assert 1 < len(first.tokens) < 20
    later = [batch.add(prompt, n, 5, GREEDY) for prompt, n in zip(PROMPTS[1:4], (1, 3, 30), strict=True)]
    served = []
    while batch.busy:
        served += batch.step()
    assert not batch.step()
    for request, n in zip([first, *later], (20, 1, 3, 30), strict=True):
        assert request.done and len(request.tokens) == n
        n_loops = 7 if request is first else 5
        assert request.tokens == alone(model, request.prompt, n, n_loops, exit)[-n:].tolist()
    assert all(served.count(request) == len(request.tokens) for request in later)


def test_each_sequence_ends_at_its_eos():
    model = model_of()
    free = model.generate_many(PROMPTS, 12, 5, temperature=0)
    eos = int(free[0][len(PROMPTS[0]) + 2])
    ended = model.generate_many(PROMPTS, 12, 5, temperature=0, eos_token_id=eos)
    for prompt, whole, found in zip(PROMPTS, free, ended, strict=True):
        new = whole[len(prompt) :].tolist()
        n = new.index(eos) + 1 if eos in new else 12
        assert torch.equal(found, whole[: len(prompt) + n])


def test_sampled_tokens_follow_the_seed_and_the_models_probabilities():
    model = model_of()

    def drawn(seed: int, n: int) -> Tensor:
        options = dict(n_loops=3, temperature=1.3, top_k=4, max_rows=n, generator=torch.Generator().manual_seed(seed))
        return torch.stack(model.generate_many([PROMPTS[0]] * n, 2, **options))[:, 5:]

    assert torch.equal(drawn(0, 20), drawn(0, 20)) and not torch.equal(drawn(0, 20), drawn(1, 20))
    found = drawn(0, 400)
    first = int(found[:, 0].mode().values)
    of_first = found[found[:, 0] == first]
    with torch.no_grad():
        logits = model(torch.cat([PROMPTS[0], torch.tensor([first])]).unsqueeze(0), 3)[:, -1]
    expected = Sampling(1.3, 4).probabilities(logits)[0]
    assert (of_first[:, 1].bincount(minlength=23) / len(of_first) - expected).abs().max() < 0.15


def test_each_request_has_its_own_sampling_options():
    model, batch = model_of(), DepthBatch(model_of())
    greedy = batch.add(PROMPTS[0], 6, 3, GREEDY)
    free = batch.add(PROMPTS[0], 6, 3, Sampling(5.0, None), generator=torch.Generator().manual_seed(0))
    while batch.busy:
        batch.step()
    assert greedy.tokens == alone(model, PROMPTS[0], 6, 3)[5:].tolist() != free.tokens


def test_modes_and_prompts_are_left_unchanged():
    model = model_of(dropout=0.5).train()
    prompt = PROMPTS[0].int()
    (found,) = model.generate_many([prompt], 4, 3, temperature=0)
    assert model.training and found.dtype == torch.int32 and torch.equal(found[:5], prompt)
    assert not found.requires_grad
    assert torch.equal(model.generate_many([prompt], 0)[0], prompt)
    assert model.generate_many([], 4) == []


@pytest.mark.parametrize("options, message", [
    (dict(prompts=[tokens(1, 4)]), r"prompt is \(1, 4\)"), (dict(prompts=[[1, 2]]), "prompts is list"),
    (dict(prompts=[torch.zeros(0, dtype=torch.long)]), "input_ids"), (dict(n_loops=[3, 3]), "2 numbers for 1 prompts"),
    (dict(n_loops=0), "n_loops=0"), (dict(max_new_tokens=-1), "max_new_tokens=-1"), (dict(top_k=0), "top_k=0"),
    (dict(max_new_tokens=70), "max_seq_len=64"), (dict(max_rows=0), "max_rows=0"),
    (dict(exit=PredictionKL()), "PredictionKL.*reads predictions"),
], ids=str)  # fmt: skip
def test_invalid_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        model_of().generate_many(**{"prompts": PROMPTS[:1], "max_new_tokens": 4, **options})


def test_training_mode_and_unrolled_models_are_refused():
    with pytest.raises(ValueError, match=r"training mode.*eval\(\)"):
        DepthBatch(model_of().train())
    with pytest.raises(ValueError, match="a separate block for each loop"):
        UnrolledMythos(model_of().cfg).eval().generate_many(PROMPTS[:1], 3)


def test_requests_that_end_with_their_first_token_report_their_errors():
    model = model_of(tied_head=False)
    with torch.no_grad():
        model.embed.weight[5] = float("nan")
    prompts = [torch.tensor([1]), torch.tensor([5]), torch.tensor([2])]
    for max_rows in (1, 8):
        with pytest.raises(ValueError, match="not finite"):
            model.generate_many(prompts, 1, 2, temperature=0, max_rows=max_rows)


def test_an_interrupted_step_loses_no_request_that_ends_with_its_first_token(monkeypatch):
    model = model_of()
    batch = DepthBatch(model, max_rows=1)
    requests = [batch.add(prompt, 1, 2, GREEDY) for prompt in PROMPTS[:3]]
    start, calls = DepthBatch._start, [0]

    def interrupted(self, request):
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        return start(self, request)

    monkeypatch.setattr(DepthBatch, "_start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        while batch.busy:
            batch.step()
    while batch.busy:
        batch.step()
    expected = [alone(model, prompt, 1, 2)[-1:].tolist() for prompt in PROMPTS[:3]]
    assert [request.tokens for request in requests] == expected and all(request.done for request in requests)
