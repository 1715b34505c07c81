"""Weight decay, learning-rate schedules, weight averages, and training of some parameters only."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from tiny import tiny_run
from torch import nn

from open_mythos.training import cost
from open_mythos.training import trainer as trainer_module
from open_mythos.training.config import OptimConfig
from open_mythos.training.optim import EMA, NO_DECAY, Optimizer, decays, lr_factor
from open_mythos.training.plan import Plan
from open_mythos.training.trainer import Trainer, check_room

# -- groups


def test_weight_decay_applies_to_matrices_only() -> None:
    for attention in ("gqa", "mla"):
        names = dict(tiny_model(attention).named_parameters())
        decaying = {name for name, p in names.items() if decays(name, p)}
        assert not any(
            word in name for name in decaying for word in ("norm", "injection", "router", ".act.", "taps", "lora.scale")
        )
        assert {"embed.weight", "recurrent.block.ffn.gate_up", "recurrent.lora.down.weight"} <= decaying
        for word in NO_DECAY:
            assert any(word in name.split(".") for name in names), f"no parameter has {word!r} in its name any more"


def test_decay_shrinks_matrices_and_leaves_norms() -> None:
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    Optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5)).step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if decays(name, p) else 1.0))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_is_updated_once(optimizer: str) -> None:
    model = tiny_model()
    made = Optimizer(model, OptimConfig(optimizer=optimizer))
    ids = [id(p) for part in made.parts for group in part.param_groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())


def test_muon_updates_the_matrices_of_blocks_with_steps_of_adamw_size() -> None:
    model = tiny_model(dim=128)  # in narrow models Muon's ways of scaling are alike
    _, muon = Optimizer(model, OptimConfig(optimizer="muon", muon_lr=5e-3, weight_decay=0.0)).parts
    taken = {id(p) for group in muon.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in taken}
    assert any(name.startswith("recurrent.block.attn.") for name in names)
    assert not any(word in name for name in names for word in ("embed", "lora", "router", "gate_up", "act.", "taps"))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    muon.step()
    for name, p in model.named_parameters():
        if name in names:
            size = (p.detach() - before[name]).square().mean().sqrt().item()
            assert 0.6e-3 < size < 1.3e-3, f"{name}: an AdamW step at lr 1e-3 is about 1e-3, this is {size:.1e}"
        else:
            assert torch.equal(p, before[name])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_loaded_optimizer_takes_exactly_the_same_steps(optimizer: str) -> None:
    def gradients(model: nn.Module, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)

    first, second = tiny_model(), tiny_model()
    cfg = OptimConfig(optimizer=optimizer)
    one, two = Optimizer(first, cfg), Optimizer(second, cfg)
    gradients(first, 0)
    one.scale_lr(0.5)
    one.step()
    second.load_state_dict(first.state_dict())
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for made, model in ((one, first), (two, second)):
        gradients(model, 1)
        made.scale_lr(0.25)
        made.step()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


# -- schedules


def test_wsd_warms_up_stays_constant_and_decays() -> None:
    cfg = OptimConfig(schedule="wsd", warmup=10, decay=0.2, floor=0.1)
    rates = [lr_factor(cfg, step, 100) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == rates[80] == 1.0
    assert rates[90] == pytest.approx(0.55) and rates[100] == pytest.approx(0.1)


def test_cosine_decays_from_the_end_of_warmup() -> None:
    cfg = OptimConfig(schedule="cosine", warmup=10, floor=0.1)
    assert lr_factor(cfg, 10, 110) == 1.0
    assert lr_factor(cfg, 60, 110) == pytest.approx(0.55)
    assert lr_factor(cfg, 110, 110) == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
@pytest.mark.parametrize(("warmup", "decay", "steps"), [(0, 0.0, 5), (0, 1.0, 5), (9, 0.2, 5), (5, 0.5, 5)])
def test_extreme_schedules_stay_between_0_and_1(schedule: str, warmup: int, decay: float, steps: int) -> None:
    cfg = OptimConfig(schedule=schedule, warmup=warmup, decay=decay)
    assert all(0 < lr_factor(cfg, step, steps) <= 1 for step in range(steps))
    assert 0 <= lr_factor(cfg, 3 * steps, steps) <= 1, "also after the last step, as in a trial that is longer"


# -- averages


def test_the_weight_average_follows_its_formula() -> None:
    model = nn.Linear(1, 1, bias=False)
    expected = 1.0
    nn.init.constant_(model.weight, expected)
    ema = EMA(dict(model.named_parameters()), decay=0.25)
    for update in range(6):
        nn.init.constant_(model.weight, float(update))
        ema.update()
        decay = min(0.25, (update + 1) / (update + 10))
        expected = decay * expected + (1 - decay) * update
    assert math.isclose(ema.average["weight"].item(), expected, rel_tol=1e-6)


def test_with_decay_0_the_average_equals_the_model() -> None:
    model = tiny_model()
    ema = EMA(dict(model.named_parameters()), decay=0.0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    ema.update()
    assert all(torch.equal(ema.average[name], p) for name, p in model.named_parameters())


def test_optim_only_leaves_all_other_parameters_unchanged() -> None:
    trainer = Trainer(tiny_run("optim.only=lora", "optim.weight_decay=0.5"))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    for _ in range(3):
        trainer.step()
    moved = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"recurrent.lora.B", "recurrent.lora.scale.weight"} <= moved
    assert all(".lora." in name or name.endswith("expert_load") for name in moved), moved


def test_frozen_parameters_take_memory_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = tiny_run("optim.only=lora")
    trainer = Trainer(cfg)
    for name, parameter in trainer.model.named_parameters():
        assert (trainer.ema.average[name].data_ptr() == parameter.data_ptr()) == (not parameter.requires_grad), name
    trainer.step()
    n, trained = (sum(p.numel() for p in trainer.model.parameters() if p.requires_grad >= least) for least in (0, 1))
    assert 0 < trained < n / 4
    assert cost.weight_bytes(trainer) == pytest.approx(4 * (n + 4 * trained), rel=0.01)
    monkeypatch.setattr(trainer_module, "memory", lambda: 4 * (n + 3 * trained) + (1 << 16))
    check_room(cfg, trainer.task)
    with pytest.raises(ValueError, match=r"training takes .* GB, but there are only"):
        check_room(tiny_run(), trainer.task)


@pytest.mark.parametrize("part", ["brige", "recurrent.act"], ids=["no such name", "the gate, trained afterwards"])
def test_optim_only_that_matches_no_trained_parameter_is_refused(part: str) -> None:
    with pytest.raises(ValueError, match=rf"optim.only='{part}' is in no name of a trained parameter; "):
        Trainer(tiny_run(f"optim.only={part}"))


def test_a_comparison_refuses_optim_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"optim\.only='lora': a comparison trains all weights of each kind; leave"):
        Plan(tiny_run("optim.only=lora"), tmp_path)
