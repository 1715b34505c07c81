"""One training step: what it draws and updates, and what stays unchanged when the loss is not finite."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_run

from open_mythos.training.objective import Objective, Outcome
from open_mythos.training.recipes import configured
from open_mythos.training.trainer import Trainer, TrainingError


def test_a_checkpoint_of_another_model_is_refused() -> None:
    trainer = Trainer(tiny_run())
    state = trainer.state_dict()
    for other, shape in (({}, "none"), ({"embed.weight": torch.zeros(1, 16)}, r"\(1, 16\)")):
        with pytest.raises(
            ValueError, match=rf"of another model: its embed.weight is {shape}, but \(3, 16\) is expected"
        ):
            trainer.load_state_dict(state | {"model": other})


def spoil(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Make the loss of these steps (counted from 0) NaN."""
    plan, call, now = Objective.plan, Objective.__call__, [0]

    def planned(self: Objective, step: int, *args: Any) -> Any:
        now[0] = step
        return plan(self, step, *args)

    def called(self: Objective, *args: Any) -> Outcome:
        outcome = call(self, *args)
        if now[0] in steps:
            outcome.loss = outcome.loss * float("nan")
            for state in self.left.values():
                state.fill_(float("nan"))
        return outcome

    monkeypatch.setattr(Objective, "plan", planned)
    monkeypatch.setattr(Objective, "__call__", called)


def test_training_lowers_the_loss() -> None:
    trainer = Trainer(tiny_run("task.max_difficulty=3", "steps=60", "batch_size=16", "loops.stale=0"))
    results = [trainer.step() for _ in range(60)]
    assert all(2 * 16 <= result.tokens <= 3 * 16 and 1 <= result.loops <= 3 for result in results)
    assert sum(r.loss for r in results[-10:]) < 0.5 * sum(r.loss for r in results[:10])
    assert results[-1].accuracy > 0.9


def test_micro_batches_change_nothing_but_memory() -> None:
    """Experts count tokens in every micro-batch and are balanced once a step."""
    whole, split = (Trainer(tiny_run(f"accumulate={n}", "loops.stale=0")) for n in (1, 4))
    torch.manual_seed(0)
    one = whole.step()
    torch.manual_seed(0)
    four = split.step()
    assert one.loss == pytest.approx(four.loss, rel=1e-5) and one.grad_norm == pytest.approx(four.grad_norm, rel=1e-4)
    assert (one.accuracy, one.loops, one.tokens) == (four.accuracy, four.loops, four.tokens)
    torch.testing.assert_close(whole.expert_load, split.expert_load, rtol=0, atol=0)
    for name, buffer in whole.model.named_buffers():
        assert torch.equal(buffer, split.model.get_buffer(name))


def test_data_depend_on_the_seed_but_not_on_the_kind_of_model() -> None:
    first, same, baseline, other = (
        Trainer(tiny_run(*overrides)) for overrides in ((), (), ("kind=unrolled",), ("seed=1",))
    )
    ids = first.draw()[0].batch.ids
    assert torch.equal(ids, same.draw()[0].batch.ids) and torch.equal(ids, baseline.draw()[0].batch.ids)
    assert not torch.equal(first.model.embed.weight, other.model.embed.weight)
    drawn = [other.draw()[0].batch.ids for _ in range(3)]
    assert not all(torch.equal(a, b) for a, b in zip(drawn, [first.draw()[0].batch.ids for _ in range(3)], strict=True))


def test_bf16_runs_blocks_in_bfloat16_and_keeps_weights_in_float32() -> None:
    trainer = Trainer(tiny_run("precision=bf16"))
    seen: set[torch.dtype] = set()
    trainer.model.recurrent.block.attn.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    trainer.step()
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_gradients_are_clipped_only_above_the_maximum_norm() -> None:
    grads = {}
    for clip in (1e-3, 1e3):
        trainer = Trainer(tiny_run(f"optim.clip={clip}"))
        before = trainer.step().grad_norm
        grads[clip] = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
        assert grads[clip].norm().item() == pytest.approx(min(clip, before), rel=1e-4) and before > 1e-3
    torch.testing.assert_close(grads[1e-3] * before / 1e-3, grads[1e3], rtol=1e-4, atol=1e-7)


def test_the_saved_model_has_the_averaged_weights() -> None:
    trainer = Trainer(tiny_run("optim.ema=0.9"))
    for _ in range(3):
        trainer.step()
    kept = trainer.averaged()
    assert not kept.training and trainer.model.training
    assert kept.head.weight is kept.embed.weight, "a tied head stays tied"
    assert torch.equal(kept.embed.weight, trainer.ema.average["embed.weight"])
    assert not torch.equal(kept.embed.weight, trainer.model.embed.weight)
    assert torch.equal(kept.recurrent.block.ffn.router_bias, trainer.model.recurrent.block.ffn.router_bias)


def test_gauges_report_rate_spectral_radius_and_expert_balance() -> None:
    trainer = Trainer(tiny_run("optim.warmup=4"))
    trainer.step()
    gauges = trainer.gauges()
    (load,) = trainer.expert_load
    assert int(load.sum()) > 0 == int(trainer.model.recurrent.block.ffn.expert_load.sum())
    assert gauges["lr"] == pytest.approx(1e-3 / 4)
    assert gauges["spectral_radius"] == trainer.model.recurrent.injection.get_A().max().item()
    assert gauges["expert_balance"] == pytest.approx(float(4 * load.min() / load.sum()))


# -- steps that are not finite


def test_a_step_with_a_non_finite_loss_changes_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, 2)
    trainer = Trainer(tiny_run())
    for _ in range(2):
        trainer.step()
    before = copy.deepcopy(trainer.state_dict())
    result = trainer.step()
    after = trainer.state_dict()
    assert result.skipped and (trainer.step_number, trainer.skipped) == (3, 1)
    for part in ("model", "ema", "optimizer"):
        torch.testing.assert_close(after[part], before[part], rtol=0, atol=0, msg=part)
    assert len(before["left"]) == 8
    for part in ("buffers", "left"):
        torch.testing.assert_close(after[part], before[part], rtol=0, atol=0, msg=part)
    assert not trainer.step().skipped and trainer.skipped_in_a_row == 0
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_too_many_skipped_steps_in_a_row_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, 0, 2, 3)
    trainer = Trainer(tiny_run("max_bad_steps=2"))
    for _ in range(3):
        trainer.check_going(trainer.step())
    result = trainer.step()
    with pytest.raises(
        TrainingError, match=r"2 steps in a row had non-finite loss or gradient, up to step 4 .loss nan.*lower optim"
    ):
        trainer.check_going(result)


# -- refused before training


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.vocab_size=2", "model.vocab_size=2, but parity has 3 tokens; use model.vocab_size=3"),
        ("evaluation.difficulties=4,99", "99 bits are 99 tokens, more than model.max_seq_len=32"),
        ("device=abacus", "device='abacus' cannot be used"),
        ("task.options.modulus=5", "parity has no option 'modulus'"),
        ("task.name=pariti", "unknown task 'pariti'; did you mean 'parity'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_the_first_step(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(tiny_run(override))


def test_the_gate_cannot_be_trained_on_easier_problems_than_the_model() -> None:
    low = tiny_run().task.min_difficulty
    with pytest.raises(ValueError, match=f"gate.max_difficulty={low - 1} is below task.min_difficulty={low}; raise it"):
        tiny_run("gate.steps=2", f"gate.max_difficulty={low - 1}")


def test_too_little_text_for_the_evaluation_is_refused_before_training(tmp_path: Path) -> None:
    for i in range(64):
        (tmp_path / f"{i}.txt").write_text(f"a few words, and {i}")
    cfg = configured("text", [
        f"task.options.source={tmp_path}", "model.dim=16", "task.min_difficulty=8", "task.max_difficulty=8",
        "evaluation.difficulties=4000", "gate.steps=0",
    ])  # fmt: skip
    with pytest.raises(ValueError, match="the difficulty of text is its number of tokens, from 1 to"):
        Trainer(cfg)
