"""The gate is trained within the user's own training loop, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from helpers import ATTENTION, assert_near, left_padding, tiny_model, tokens

from open_mythos import OpenMythos
from open_mythos.nn.halting import ACTHalting, converged, gate_loss


def gradients(model: OpenMythos, **inputs) -> dict[str, torch.Tensor | None]:
    model.train().zero_grad()
    model(tokens(3, 8), 2, **inputs).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_converged_means_near_the_final_state_from_that_loop_on():
    ends = torch.tensor([[3.0], [1.0], [1.0], [1.0]])  # one position of width 1, its states at four loops
    passes_by = torch.tensor([[1.0], [3.0], [1.05], [1.0]])
    found = converged(torch.stack([ends, passes_by], dim=1).unsqueeze(-1), tolerance=0.1)
    assert found[:, 0, 0].tolist() == [False, True, True, True]
    assert found[:, 1, 0].tolist() == [False, False, True, True]
    elsewhere = converged(ends.unsqueeze(1), 0.1, end=torch.full((1, 1), 3.0))
    assert not elsewhere.any()


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("padded", [False, True])
def test_the_gate_gets_a_gradient_and_other_gradients_are_unchanged(attn_type, padded):
    mask = left_padding([8, 6, 3], 8) if padded else None
    with_gate = gradients(tiny_model(attn_type, halting=True), attention_mask=mask)
    without = gradients(tiny_model(attn_type, halting=False), attention_mask=mask)
    for name, grad in with_gate.items():
        if ".act." in name:
            assert grad.abs().max() > 0 and without[name] is None
        else:
            assert_near(grad, without[name], 1e-6, name)


def test_training_the_gate_changes_neither_mode_nor_buffers():
    models = [tiny_model(halting=halting).train() for halting in (True, False)]
    for model in models:
        model(tokens(3, 8), 2)
        assert all(module.training for module in model.modules())
    for (name, one), other in zip(models[0].named_buffers(), models[1].buffers(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("setting", ["eval", "no_grad", "auxiliary=False"])
def test_the_gate_is_not_trained_in_eval_mode_without_gradients_or_auxiliary(setting, monkeypatch):
    model, calls = tiny_model().train(setting != "eval"), []
    monkeypatch.setattr(model.recurrent, "states", lambda *args: calls.append(args))
    with torch.set_grad_enabled(setting != "no_grad"):
        model(tokens(2, 4), 2, auxiliary=setting != "auxiliary=False")
    assert not calls


def test_a_gate_without_trainable_parameters_is_not_trained():
    model = tiny_model().train()
    model.recurrent.act.forward = lambda h: h.new_full(h.shape[:2], 0.5)
    model.recurrent.act.requires_grad_(False)
    model(tokens(2, 4), 2).mean().backward()


def test_a_gate_that_does_not_use_its_parameters_is_not_trained():
    model = tiny_model().train()
    model.recurrent.act.forward = lambda h: h.new_full(h.shape[:2], 0.5)
    model(tokens(2, 4), 2).mean().backward()


def test_a_part_of_the_gate_can_be_frozen():
    model = tiny_model().train()
    model.recurrent.act.hidden.requires_grad_(False)
    model(tokens(2, 4), 2).mean().backward()
    assert model.recurrent.act.halt.bias.grad.abs() > 0 and model.recurrent.act.hidden.weight.grad is None


def test_the_gate_learns_to_recognise_converged_states():
    torch.manual_seed(0)
    act = ACTHalting(8)
    optimizer = torch.optim.AdamW(act.parameters(), lr=1e-3)
    done, moving = torch.randn(64, 8) + 2, torch.randn(3, 64, 8) - 2  # converged states are recognisable

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


def test_padding_does_not_affect_the_gate_loss():
    act, states = ACTHalting(4), torch.randn(4, 2, 5, 4)
    torch.nn.init.normal_(act.halt.weight)
    live = torch.tensor([[True] * 5, [False] * 5])
    assert_near(gate_loss(act, states, live, 0.1), gate_loss(act, states[:, :1], live[:1], 0.1), 1e-6)


# -- scaled losses, accumulation and optimizers of the caller


def gate_gradients(model: OpenMythos, batches: list[torch.Tensor], scale: float) -> list[torch.Tensor]:
    """The gate's gradients that an optimizer's step gets, after backward passes of ``batches`` with scaled losses."""
    model.zero_grad()
    for ids in batches:
        (model(ids, 2).square().mean() * scale).backward()
    torch.optim.SGD(model.parameters(), 0.0).step()
    return [p.grad.clone() for p in model.recurrent.act.parameters()]


def test_loss_scale_and_accumulation_do_not_change_the_gates_gradients():
    model, batches = tiny_model(router_bias_rate=0.0).train(), list(tokens(3, 4, 6))
    alone = [gate_gradients(model, [ids], 1.0) for ids in batches]
    mean = [sum(grads) / 3 for grads in zip(*alone, strict=True)]
    for scale in (1.0, 1024.0, 1e-3):
        for actual, expected in zip(gate_gradients(model, batches, scale), mean, strict=True):
            assert expected.abs().max() > 0
            assert_near(actual, expected, 1e-6, str(scale))


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_does_not_change_training(fused):
    """A fused optimizer unscales gradients in its step, others before it."""
    steps = {}
    for scaled in (False, True):
        model, ids = tiny_model(warm_start=False).train(), tokens(4, 6)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=4096.0, enabled=scaled)
        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale(model(ids, 2).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        steps[scaled] = {name: p.detach() for name, p in model.named_parameters()}
    before = dict(tiny_model(warm_start=False).named_parameters())
    for name, parameter in steps[True].items():
        assert_near(parameter, steps[False][name], 1e-5, name)
    assert not torch.equal(steps[True]["recurrent.act.halt.bias"], before["recurrent.act.halt.bias"])


def test_the_gate_can_have_its_own_optimizer():
    """As is common for matrices and other parameters; whichever steps first."""
    found = []
    for order in ((0,), (1, 2), (2, 1)):
        model = tiny_model(router_bias_rate=0.01).train()
        gate = list(model.recurrent.act.parameters())
        others = [p for p in model.parameters() if all(p is not q for q in gate)]
        optimizers = [torch.optim.SGD(group, 0.1) for group in (list(model.parameters()), gate, others)]
        for _ in range(2):
            model.zero_grad()
            for ids in tokens(2, 4, 6):
                (model(ids, 2).square().mean() / 2).backward()
            for i in order:
                optimizers[i].step()
        found.append(model.state_dict())
    for name, value in found[0].items():
        for other in found[1:]:
            assert_near(other[name].float(), value.float(), 1e-6, name)
    assert found[0]["recurrent.block.ffn.router_bias"].abs().max() > 0.01


def test_pending_gradients_do_not_grow_without_optimizer_steps():
    """For users of input gradients only, or of updates made by hand."""
    from open_mythos.nn import auxiliary

    model = tiny_model().train()
    for _ in range(3):
        model(tokens(2, 4), 2).mean().backward()
    (pending,) = [found for core, found in auxiliary._pending.items() if core is model.recurrent]
    assert pending.n_runs == 3 and len(pending.gradients) == len(list(model.recurrent.act.parameters()))


def test_a_batch_skipped_as_not_finite_leaves_the_gate_finite():
    """A GradScaler skips such batches, as does many a training loop."""
    model, ids = tiny_model(warm_start=False).train(), tokens(4, 6)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model(model.embed(ids) * factor, 2).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_training_step_may_have_positions_for_each_row():
    model, ids = tiny_model().train(), tokens(9, 6)
    positions = torch.arange(6).expand(9, 6) + 3 * torch.arange(9).unsqueeze(1)
    h, _ = model.states(ids, 2, positions=positions)
    h.sum().backward()
    one, _ = model.states(ids[7:8], 2, positions=positions[7:8])
    assert_near(h[7:8], one)
