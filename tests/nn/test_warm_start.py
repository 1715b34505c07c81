"""In training, one row in eight starts from a deeper state of its own."""

from __future__ import annotations

import pytest
import torch
from helpers import ATTENTION, assert_near, left_padding, tiny_model, tokens


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("padded", [False, True])
def test_one_row_in_eight_starts_from_a_deeper_state(attn_type, padded):
    model, ids = tiny_model(attn_type, warm_start=True, halting=False, lora_rank=0), tokens(17, 6)
    mask = left_padding([3, 6] + [5] * 15, 6) if padded else None
    with torch.no_grad():
        whole = [logits for _, logits in model.eval().iterate(ids, 8, attention_mask=mask)]
    found = model.train()(ids, 2, attention_mask=mask).detach()
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    # Four loops are explored; the first row has run one of them when it starts, the second three.
    for row, n_loops in enumerate([3, 5] + [2] * 15):
        assert_near(found[row][real[row]], whole[n_loops - 1][row][real[row]], 1e-4, str(row))


def test_warm_start_is_deterministic():
    model, ids = tiny_model(warm_start=True).train(), tokens(16, 5)
    assert torch.equal(model(ids, 2), model(ids, 2))


def test_a_batch_of_seven_rows_has_no_warm_start():
    ids = tokens(7, 5)
    on, off = (tiny_model(warm_start=on).train() for on in (True, False))
    assert torch.equal(on(ids, 2), off(ids, 2))


@pytest.mark.parametrize("setting", ["eval", "no_grad", "off"])
def test_warm_start_is_off_in_eval_mode_without_gradients_or_by_config(setting):
    model, ids = tiny_model(warm_start=setting != "off", halting=False), tokens(8, 5)
    model.train(setting != "eval")
    with torch.set_grad_enabled(setting == "off"):
        found = model(ids, 2)
    with torch.no_grad():
        assert_near(found, model.eval()(ids, 2), 1e-5)


def test_exploring_loops_change_no_gradients_and_no_counters():
    model, ids = tiny_model(warm_start=True, halting=False).train(), tokens(8, 5)
    other = tiny_model(warm_start=False, halting=False).train()
    model(ids, 2)[1:].square().mean().backward()  # not the row that starts deeper
    other(ids, 2)[1:].square().mean().backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        if q.grad is not None:
            assert_near(p.grad, q.grad, 1e-5, name)
    assert int(model.recurrent.lora.trained_loops) == int(other.recurrent.lora.trained_loops)
    assert all(module.training for module in model.modules())
