"""Documents packed into one row: each is computed as if it were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import ATTENTION, assert_near, gradients, loops_used, tiny_config, tiny_model, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from open_mythos import KVCache
from open_mythos.context import Context
from open_mythos.diagnostics import trace
from open_mythos.nn.attention import GQAttention
from open_mythos.ops.attention import AttentionMask, attend, document_numbers
from open_mythos.ops.reference import attention
from open_mythos.reference import reference_logits
from open_mythos.tasks import UNSCORED, Batch
from open_mythos.training.config import LoopConfig, TrainConfig
from open_mythos.training.objective import Objective

PACKED = torch.tensor([[1] * 5 + [2] + [3] * 9 + [4] * 7, [7] * 20 + [9] * 2, [1] * 3 + [2] * 10 + [3] * 4 + [0] * 5])
VARIATIONS: list[dict[str, Any]] = [
    {},
    dict(conv_taps=5, local_window=9),
    dict(local_window=3, local_share=1.0, loop_index_dim=8),
    dict(prelude_layers=0, coda_layers=0, state_init="zero", lora_rank=0),
]


@pytest.mark.parametrize("changes", VARIATIONS, ids=str)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_packed_documents_give_the_logits_and_gradients_of_each_alone(
    attn_type: str, training: bool, changes: dict[str, Any]
) -> None:
    model, ids, real = tiny_model(attn_type, **changes).train(training), tokens(3, 22), PACKED > 0
    weight = torch.randn(3, 22, 23, generator=torch.Generator().manual_seed(0)) * real[..., None]
    logits, expected = model(ids, 4, attention_mask=PACKED), reference_logits(model, ids, 4, PACKED)
    assert_near(logits[real], expected[real])
    actual = gradients(model, (logits * weight).sum())
    for name, gradient in gradients(model, (expected * weight).sum()).items():
        if not (training and name.startswith("recurrent.act.")):  # the gate is trained by a loss of its own
            assert_near(actual[name], gradient, 1e-4, name)


@pytest.mark.parametrize("attn_type", ATTENTION)
@settings(max_examples=6)
@given(lengths=st.lists(st.integers(1, 12), min_size=2, max_size=4), n_loops=st.integers(1, 5))
def test_packed_documents_halt_at_the_same_loops_as_alone(attn_type: str, lengths: list[int], n_loops: int) -> None:
    model = tiny_model(attn_type)
    model.cfg.max_seq_len = 64
    numbers = torch.repeat_interleave(torch.arange(1, 1 + len(lengths)), torch.tensor(lengths))[None]
    ids = tokens(1, sum(lengths), seed=n_loops)
    together, used = (
        model(ids, n_loops, attention_mask=numbers),
        loops_used(model, ids, n_loops, attention_mask=numbers),
    )
    for number in range(1, 1 + len(lengths)):
        alone = ids[numbers == number][None]
        assert_near(together[numbers == number], model(alone, n_loops)[0])
        assert torch.equal(used[numbers == number], loops_used(model, alone, n_loops)[0])
    assert torch.equal(trace(model, ids, n_loops, numbers).loops_used, used)


@pytest.mark.parametrize("per", ["batch", "sequence"])
def test_packed_rows_give_the_training_gradients_of_separate_documents(per: str) -> None:
    """Loss and gradients of the training objective, with rows that run different numbers of loops."""
    cfg = TrainConfig(loops=LoopConfig("uniform", minimum=1, maximum=3, per=per, gradient="all"))
    model, objective, ids = tiny_model(halting=False).train(), Objective(cfg), tokens(3, 22)
    targets = torch.where(PACKED > 0, tokens(3, 22, seed=1), UNSCORED)
    plan, n_scored = objective.plan(0, 3, 22, torch.Generator().manual_seed(0)), int((PACKED > 0).sum())
    packed = objective(model, Batch(ids, targets, PACKED), plan, n_scored).loss
    loss = torch.zeros(())
    for row in range(3):
        for number in PACKED[row].unique()[PACKED[row].unique() > 0]:
            here = PACKED[row] == number
            alone = Batch(ids[row, here][None], targets[row, here][None])
            loss = loss + objective(model, alone, plan[slice(row, row + 1)], n_scored).loss
    assert_near(packed, loss)
    actual, expected = gradients(model, packed), gradients(model, loss)
    for name in actual:
        assert_near(actual[name], expected[name], 1e-4, name)


@pytest.mark.parametrize("window", [None, 1, 3, 40])
@pytest.mark.parametrize("length", [7, 22, 70])
def test_attention_stays_within_documents(window: int | None, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    numbers = torch.randint(0, 2, (2, length), generator=generator).cumsum(1) + 1
    mask = AttentionMask(length, length, documents=document_numbers(numbers))
    q, k, v = (torch.randn(2, length, n, 8, generator=generator) for n in (4, 2, 2))
    at = torch.arange(length)
    allowed = (at[:, None] >= at) & (numbers[:, None, :, None] == numbers[:, None, None, :])
    allowed = allowed if window is None else allowed & (at[:, None] - at < window)
    found = attend(q, torch.cat([k, v], -1), mask, 8**-0.5, 4 if window else 0, window or 0)
    assert_near(found, attention(q, k, v, allowed, 8**-0.5))


def test_a_convolution_stays_within_documents() -> None:
    attn = GQAttention(tiny_config(conv_taps=5))
    torch.nn.init.normal_(attn.k_conv.taps), torch.nn.init.normal_(attn.v_conv.taps)
    rows, numbers = torch.randn(2, 9, 2, 16), torch.tensor([[1] * 4 + [2] * 5, [1] + [2] * 2 + [3] * 6])

    def convolved(rows: torch.Tensor, documents: torch.Tensor | None) -> torch.Tensor:
        T = rows.shape[1]
        mask = AttentionMask(T, T, documents=documents)
        return attn._convolve(rows, None, Context(torch.zeros(1), mask), mask)

    found = convolved(rows, numbers)
    for row in range(2):
        for number in numbers[row].unique():
            here = numbers[row] == number
            assert_near(found[row, here], convolved(rows[row, here][None], None)[0])


def test_one_document_per_row_is_plain_attention() -> None:
    ones = torch.ones(2, 5, dtype=torch.int64)
    assert document_numbers(ones) is None and document_numbers(ones.bool()) is None
    assert document_numbers(torch.tensor([[0, 0, 1, 1]])) is None
    model, ids = tiny_model(), tokens(2, 5)
    assert torch.equal(model(ids, 2), model(ids, 2, attention_mask=ones))
    found = document_numbers(torch.tensor([[0, 1, 1, 2, 2, 2, 0], [2, 2, 1, 1, 2, 2, 2]]))
    assert found is not None and found.diff(dim=1).tolist() == [[1, 0, 1, 0, 0, 1], [0, 1, 0, 1, 0, 0]]


def test_packed_documents_with_a_cache_are_refused() -> None:
    cache = KVCache()
    with pytest.raises(
        ValueError,
        match="attention_mask numbers documents, which needs positions that start at 0 and no key/value cache",
    ):
        tiny_model()(tokens(1, 22), 2, cache, attention_mask=PACKED[:1])
    assert cache.length == 0


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_warm_started_training_rows_stay_within_documents(attn_type: str) -> None:
    model, numbers = tiny_model(attn_type, warm_start=True).train(), torch.tensor([[1] * 5 + [2] * 6]).expand(8, -1)
    ids = tokens(8, 11)
    other = ids.clone()
    other[0, :5] = (ids[0, :5] + 1) % 23
    first, second = (model(x, 3, attention_mask=numbers)[0] for x in (ids, other))
    assert_near(first[5:], second[5:])
    assert not torch.allclose(first[:5], second[:5])
