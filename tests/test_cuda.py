"""On a GPU: the fast paths give what the plain ones do, training in bfloat16 learns, generation is the CPU's."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import ATTENTION, assert_near, gradients, left_padding, tiny_model, tokens

from open_mythos import KVCache
from open_mythos.reference import reference_logits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
CLOSE = 2e-4  # float32 products, summed in another order


@pytest.fixture(autouse=True)
def full_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("halting", [False, True])
def test_logits_are_the_reference_ones(attn_type, halting):
    model, ids = tiny_model(attn_type, halting=halting).cuda(), tokens(3, 9).cuda()
    mask = left_padding([9, 5, 1], 9).cuda()
    with torch.no_grad():
        expected = reference_logits(model, ids, 5, mask)
        found = model(ids, 5, attention_mask=mask)
    assert_near(found[mask], expected[mask], CLOSE)


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_gradients_are_the_reference_ones(attn_type):
    model, ids = tiny_model(attn_type, halting=False).train().cuda(), tokens(2, 9).cuda()
    expected = gradients(model, reference_logits(model, ids, 3).square().sum())
    found = gradients(model, model(ids, 3).square().sum())
    for name, gradient in found.items():
        assert_near(gradient, expected[name], 10 * CLOSE, name)


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_a_cache_changes_nothing(attn_type):
    model, ids, cache = tiny_model(attn_type, halting=False).cuda(), tokens(2, 12).cuda(), KVCache()
    with torch.inference_mode():
        whole = model(ids, 4)
        found = [model(part, 4, cache) for part in ids.split([7, 1, 1, 3], 1)]
    assert_near(torch.cat(found, 1), whole, CLOSE)


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_generation_is_that_of_the_cpu(attn_type):
    model, ids = tiny_model(attn_type), tokens(2, 5)
    expected = model.generate(ids, 8, n_loops=4, temperature=0)
    assert torch.equal(copy.deepcopy(model).cuda().generate(ids.cuda(), 8, n_loops=4, temperature=0).cpu(), expected)


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("default")  # the compiler's own
def test_training_in_bfloat16_learns(attn_type, compiled):
    model, ids = tiny_model(attn_type, halting=False).train().cuda(), tokens(8, 17).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    if compiled:
        for block in (*model.prelude, model.recurrent.block, *model.coda):
            block.compile()
    losses = []
    for _ in range(30):
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(ids[:, :-1], 3).flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
