"""The gate learns from the user's own training loop, and nothing else notices."""

from __future__ import annotations

import pytest
import torch
from helpers import ATTENTION, assert_near, left_padding, tiny_model, tokens

from open_mythos import OpenMythos
from open_mythos.nn.halting import ACTHalting, gate_loss, settled, with_loss


def gradients(model: OpenMythos, **inputs) -> dict[str, torch.Tensor | None]:
    model.train().zero_grad()
    model(tokens(3, 8), 2, **inputs).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_settled_means_near_the_end_from_there_on():
    ends = torch.tensor([[3.0], [1.0], [1.0], [1.0]])  # one position, width 1: passes by its end, then returns to it
    passes_by = torch.tensor([[1.0], [3.0], [1.05], [1.0]])
    found = settled(torch.stack([ends, passes_by], dim=1).unsqueeze(-1), tolerance=0.1)
    assert found[:, 0, 0].tolist() == [False, True, True, True]
    assert found[:, 1, 0].tolist() == [False, False, True, True]


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("padded", [False, True])
def test_the_gate_gets_a_gradient_and_nothing_else_changes(attn_type, padded):
    mask = left_padding([8, 6, 3], 8) if padded else None
    with_gate = gradients(tiny_model(attn_type, halting=True), attention_mask=mask)
    without = gradients(tiny_model(attn_type, halting=False), attention_mask=mask)
    for name, grad in with_gate.items():
        if ".act." in name:
            assert grad.abs().max() > 0 and without[name] is None
        else:
            assert_near(grad, without[name], 1e-6, name)


def test_learning_leaves_no_other_trace():
    models = [tiny_model(halting=halting).train() for halting in (True, False)]
    for model in models:
        model(tokens(3, 8), 2)
        assert all(module.training for module in model.modules())
    for (name, one), other in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        assert torch.equal(one, other), name


def test_no_gate_is_taught_without_gradients_or_in_eval_mode(monkeypatch):
    model, calls = tiny_model(), []
    monkeypatch.setattr(model.recurrent, "_explore", lambda *args: calls.append(args))
    with torch.no_grad():
        model.train()(tokens(2, 4), 2)
    model.eval()(tokens(2, 4), 2)
    assert not calls


def test_a_gate_without_parameters_is_left_alone():
    model = tiny_model().train()
    model.recurrent.act.forward = lambda h: h.new_full(h.shape[:2], 0.5)
    model(tokens(2, 4), 2).mean().backward()


def test_the_gate_learns_what_settling_looks_like():
    torch.manual_seed(0)
    act = ACTHalting(8)
    optimizer = torch.optim.AdamW(act.parameters(), lr=1e-3)
    done, moving = torch.randn(64, 8) + 2, torch.randn(3, 64, 8) - 2  # settled states are recognisable

    def states(first_done: int) -> torch.Tensor:
        loops = [moving[t] if t < first_done else done for t in range(4)]
        return torch.stack([moving[0], *loops]).unsqueeze(2)

    live = torch.ones(64, 1, dtype=torch.bool)
    for step in range(400):
        loss = gate_loss(act, states(1 + step % 3), live, tolerance=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert act(done.unsqueeze(1)).mean() > 0.9 and act(moving[0].unsqueeze(1)).mean() < 0.05


def test_padding_teaches_nothing():
    act, states = ACTHalting(4), torch.randn(4, 2, 5, 4)
    torch.nn.init.normal_(act.halt.weight)
    live = torch.tensor([[True] * 5, [False] * 5])
    assert_near(gate_loss(act, states, live, 0.1), gate_loss(act, states[:, :1], live[:1], 0.1), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_loss_adds_its_gradient_and_changes_no_value(dtype):
    x, w = torch.randn(3, dtype=dtype, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    out = with_loss(x, 3 * w)
    assert torch.equal(out, x)
    (5 * out).sum().backward()
    assert x.grad.tolist() == [5.0] * 3 and w.grad == 3
