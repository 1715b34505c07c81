"""The numbers of `--dry-run`, checked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny import tiny_run

from open_mythos.diagnostics import flops_per_token
from open_mythos.training import cost
from open_mythos.training.cost import flops_per_step, run_cost
from open_mythos.training.recipes import configured
from open_mythos.training.trainer import Trainer

FIXED = ("loops.schedule=fixed", "loops.mean=3", "task.min_difficulty=5", "task.max_difficulty=5")


@pytest.mark.parametrize(
    ("overrides", "passes"),
    [
        (("loops.grad_loops=2",), 1 + 2 * 3),
        (("loops.gradient=all",), 3 * 3),
        (("loops.gradient=one_step", "checkpoint_loops=true"), 2 + 4),
        (("kind=single",), 3),
    ],
)
def test_flops_count_loops_with_gradient_three_times(overrides: tuple[str, ...], passes: int) -> None:
    cfg = tiny_run(*FIXED, *overrides)
    outside, one = (flops_per_token(cfg.model, n, 3) for n in (0, 1))
    assert flops_per_step(cfg) == pytest.approx(8 * 5 * (3 * outside + passes * (one - outside)))


@pytest.mark.parametrize(("recomputed", "times"), [("false", 3), ("true", 4)])
def test_flops_count_the_readout_of_every_supervised_loop(recomputed: str, times: int) -> None:
    cfg = tiny_run(*FIXED, "loops.grad_loops=2", "loss.depth=uniform", f"checkpoint_loops={recomputed}")
    assert (cfg.model.prelude_layers, cfg.model.coda_layers) == (1, 1)
    outside, one = (flops_per_token(cfg.model, n, 3) for n in (0, 1))
    block = flops_per_token(replace(cfg.model, coda_layers=2), 0, 3) - outside
    expected = 3 * block + (1 + 2 * times) * (one - outside) + 2 * times * (outside - block)
    assert flops_per_step(cfg) == pytest.approx(8 * 5 * expected)


def test_memory_counts_weights_gradients_adam_states_and_average(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_TRIAL_STEPS", 3)  # tests of commands, which may run before, change it
    found = run_cost(tiny_run(*FIXED))
    assert found.weight_bytes == pytest.approx(4 * found.parameters * 5, rel=0.1)
    assert found.seconds_per_step > 0 and found.trial_steps == 3


def test_activation_memory_shrinks_with_micro_batches_and_recomputation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_TRIAL_STEPS", 1)

    def kept(*overrides: str) -> int:
        return run_cost(tiny_run(*FIXED, "loops.gradient=all", *overrides)).activation_bytes

    whole = kept()
    assert kept("accumulate=4") < 0.5 * whole and kept("checkpoint_loops=true") < 0.8 * whole


def test_flops_add_up_over_tasks_and_growing_ones_count_at_full_size() -> None:
    sizes = ("model.dim=16", "model.expert_dim=16", "batch_size=2", "task.max_difficulty=2")
    both = configured("words", ["task.options.weights={'assignments': 1, 'relations': 1}", *sizes])
    names = "assignments", "relations"
    each = [configured("words", [f"task.options.weights={{'{name}': 1}}", *sizes]) for name in names]
    assert flops_per_step(both) == pytest.approx(sum(map(flops_per_step, each)), rel=0.1)
    cfg = configured("assignments", [*sizes, "gate.steps=0", "evaluation.examples=1", "evaluation.loops=1"])
    seen = list[float]()
    with pytest.MonkeyPatch.context() as patch:
        step = Trainer.step
        patch.setattr(Trainer, "step", lambda self: (seen.append(self.growths["assignments"].size), step(self))[1])
        run_cost(cfg)
    assert set(seen) == {1.0}
