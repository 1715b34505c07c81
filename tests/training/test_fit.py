"""The files that a run writes, and resuming: a stopped and resumed run equals an uninterrupted one, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model
from test_trainer import spoil
from tiny import tiny_run

from open_mythos import OpenMythos
from open_mythos.evaluation.summary import Evaluation
from open_mythos.training import checkpoints, loggers, runs
from open_mythos.training.config import TrainConfig
from open_mythos.training.fit import Watch, averaged, fit
from open_mythos.training.loggers import read_metrics
from open_mythos.training.trainer import TrainingError

CLOCK = ("seconds", "tokens_per_second", "eta_seconds")


class Stopped(Exception):
    pass


def stop_after(step: int) -> Watch:
    def record(line: Any) -> None:
        if line["step"] == step:
            raise Stopped

    return Watch(record, log=lambda message: None)


def quiet(messages: list[str] | None = None) -> Watch:
    return Watch(log=(messages if messages is not None else []).append)


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def plain(state: Any) -> Any:
    """``state`` with tensors as lists, which == compares exactly."""
    if isinstance(state, torch.Tensor | checkpoints.Stored):
        return str(state[()].dtype), state[()].tolist()
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    return [plain(item) for item in state] if isinstance(state, list | tuple) else state


def assert_same_run(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    mine, others = (plain(checkpoints.load(run / "checkpoints/step_00000012")["trainer"]) for run in (one, other))
    assert mine == others
    assert (one / "model/model.safetensors").read_bytes() == (other / "model/model.safetensors").read_bytes()
    assert (one / "evaluation.json").read_text() == (other / "evaluation.json").read_text()


# -- output files


def test_a_run_writes_its_config_metrics_checkpoints_model_and_evaluation(tmp_path: Path) -> None:
    cfg, seen = tiny_run("log_every=5", "gate.steps=2", "gate.batch_size=2"), list[Any]()
    assert fit(cfg, tmp_path, watch=Watch(seen.append, pytest.fail)) == tmp_path / "model"
    assert TrainConfig.load(tmp_path / "config.json") == TrainConfig.load(tmp_path / "model/training.json") == cfg
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [5, 10, 12] and len(seen) == 3
    assert {"loss", "accuracy", "loops", "grad_norm", "lr", "spectral_radius", "expert_balance", "skipped"} <= {
        *seen[0]
    }
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000008", "step_00000012"]
    assert OpenMythos.from_pretrained(tmp_path / "model").cfg.halting
    assert Evaluation.load(tmp_path).grids[0].difficulties == [4]


@pytest.mark.parametrize(("kind", "loops"), [("single", 1), ("wide", 1), ("unrolled", 3), ("plain", 3)])
def test_a_baseline_is_evaluated_at_its_own_depth_and_loads_again(tmp_path: Path, kind: str, loops: int) -> None:
    fit(tiny_run(f"kind={kind}", "gate.steps=2"), tmp_path, watch=quiet())
    assert Evaluation.load(tmp_path).grids[0].loops == [loops]
    assert runs.load_model(tmp_path).cfg.max_loop_iters == loops


def test_metrics_are_means_over_the_steps_since_the_last_line(tmp_path: Path) -> None:
    fit(tiny_run(), tmp_path / "each", watch=quiet())
    fit(tiny_run("log_every=4"), tmp_path / "fourth", watch=quiet())
    each, fourth = metrics(tmp_path / "each"), metrics(tmp_path / "fourth")
    for key in ("loss", "accuracy", "grad_norm", "cross_entropy"):
        assert fourth[1][key] == pytest.approx(sum(line[key] for line in each[4:8]) / 4)


def test_text_is_evaluated_in_bits_per_byte(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for i in range(60):
        (tmp_path / "corpus" / f"{i}.txt").write_text(f"the same weights, run for {i} loops, think deeper\n" * 20)
    cfg = tiny_run(
        "task.name=text", f"task.options.source={tmp_path / 'corpus'}", "task.min_difficulty=16",
        "task.max_difficulty=16", "evaluation.difficulties=16", "model.vocab_size=257", "steps=2",
    )  # fmt: skip
    fit(cfg, tmp_path / "run", watch=quiet())
    assert "bits_per_byte" in (tmp_path / "run/evaluation.json").read_text()


# -- stopping and resuming


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("optim.optimizer=muon", "model.dropout=0.1", "accumulate=2", "log_every=3"),
        ("loops.per=sequence", "loops.schedule=lognormal", "loops.mean=2", "model.state_init=noise", "precision=bf16"),
        ("loss.depth=progressive", "loops.gradient=all", "checkpoint_loops=true", "model.state_noise=0.1", "keep=1"),
        ("kind=unrolled", "optim.schedule=cosine"),
    ],
    ids=["experts-and-stale-states", "muon", "sequence-bf16", "progressive", "unrolled"],
)
def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    cfg = tiny_run(*overrides)
    fit(cfg, tmp_path / "whole", watch=quiet())
    with pytest.raises(Stopped):
        fit(cfg, tmp_path / "stopped", watch=stop_after(6))
    torch.manual_seed(12345)
    fit(cfg, tmp_path / "stopped", resume="auto", watch=quiet())
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_resuming_right_after_skipped_steps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The experts' load is summed over the steps since the last update of the router bias, without skipped steps."""
    spoil(monkeypatch, 3, 6)
    cfg = tiny_run("save_every=2")
    fit(cfg, tmp_path / "whole", watch=quiet())
    for step in (5, 8):
        with pytest.raises(Stopped):
            fit(cfg, tmp_path / "stopped", resume="auto", watch=stop_after(step))
    fit(cfg, tmp_path / "stopped", resume="auto", watch=quiet())
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert metrics(tmp_path / "whole")[-1]["skipped"] == 2 and metrics(tmp_path / "whole")[3]["loss"] is None


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    cfg = tiny_run("steps=12", "save_every=3")
    cfg.save(tmp_path / "cfg.json")
    program = (
        "import sys, time, torch; from pathlib import Path\n"
        "from open_mythos.training.config import TrainConfig; from open_mythos.training.fit import Watch, fit\n"
        "torch.set_num_threads(1)\n"
        "watch = Watch(record=lambda line: time.sleep(0.1))\n"
        "fit(TrainConfig.load(sys.argv[1]), Path(sys.argv[2]), watch=watch)\n"
    )
    victim = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "cfg.json"), str(tmp_path / "killed")])
    file, deadline = tmp_path / "killed/metrics.jsonl", time.monotonic() + 120
    while not file.exists() or file.read_bytes().count(b"\n") < 8:
        assert victim.poll() is None and time.monotonic() < deadline, "it should still be training"
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed/model").exists()
    fit(cfg, tmp_path / "killed", resume="auto", watch=quiet())
    fit(cfg, tmp_path / "whole", watch=quiet())
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_previous_one(tmp_path: Path) -> None:
    cfg = tiny_run()
    fit(cfg, tmp_path / "whole", watch=quiet())
    with pytest.raises(Stopped):
        fit(cfg, tmp_path / "torn", watch=stop_after(9))
    state = tmp_path / "torn/checkpoints/step_00000008/state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    messages: list[str] = []
    fit(cfg, tmp_path / "torn", resume="auto", watch=quiet(messages))
    assert "skipping checkpoint step_00000008" in messages[0] and "step_00000004" in messages[1]
    assert_same_run(tmp_path / "whole", tmp_path / "torn")


def test_a_checkpoint_given_by_path_resumes_in_another_folder(tmp_path: Path) -> None:
    fit(tiny_run(), tmp_path / "whole", watch=quiet())
    fit(tiny_run(), tmp_path / "branch", resume=str(tmp_path / "whole/checkpoints/step_00000008"), watch=quiet())
    assert metrics(tmp_path / "branch") == metrics(tmp_path / "whole")[8:]
    with pytest.raises(ValueError, match="there is no checkpoint"):
        fit(tiny_run(), tmp_path / "other", resume=str(tmp_path / "nothing"), watch=quiet())
    with pytest.raises(ValueError, match="holds a run"):
        fit(tiny_run(), tmp_path / "branch", resume=str(tmp_path / "whole/checkpoints/step_00000008"), watch=quiet())


def test_a_run_resumed_from_a_path_may_be_killed_before_its_next_checkpoint(tmp_path: Path) -> None:
    """In another folder, and back to an earlier checkpoint in its own."""
    whole, branch = tmp_path / "whole", tmp_path / "branch"
    fit(tiny_run(), whole, watch=quiet())
    lines = metrics(whole)
    for run in (branch, whole):
        with pytest.raises(Stopped):
            fit(tiny_run(), run, resume=str(whole / "checkpoints/step_00000008"), watch=stop_after(10))
        fit(tiny_run(), run, resume="auto", watch=quiet())
        assert metrics(run) == (lines[8:] if run == branch else lines)
    assert plain(checkpoints.load(branch / "checkpoints/step_00000012")["trainer"]) == plain(
        checkpoints.load(whole / "checkpoints/step_00000012")["trainer"]
    )


def test_a_checkpoint_is_exported_if_training_started_from_a_model_of_more_loops(tmp_path: Path) -> None:
    tiny_model(dim=16, vocab_size=3, max_loop_iters=8).save_pretrained(tmp_path / "start")
    cfg = tiny_run(f"start={tmp_path / 'start'}", "model.max_loop_iters=3", "steps=4")
    fit(cfg, tmp_path / "run", watch=quiet())
    model, tensors, _ = averaged(tmp_path / "run/checkpoints/step_00000004")
    assert tensors["recurrent.lora.scale.weight"].shape[0] == model.recurrent.lora.scale.num_embeddings == 8
    assert tensors.keys() == OpenMythos.from_pretrained(tmp_path / "run/model").state_dict().keys() - {"head.weight"}


def test_resume_auto_without_a_checkpoint_starts_from_scratch(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        fit(tiny_run(), tmp_path, watch=stop_after(2))
    fit(tiny_run(), tmp_path, resume="auto", watch=quiet())
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 13))


# -- errors and recovery


def test_a_new_run_does_not_overwrite_an_existing_one(tmp_path: Path) -> None:
    fit(tiny_run("steps=1"), tmp_path, watch=quiet())
    with pytest.raises(ValueError, match="holds a run; resume it with --resume auto, or choose another --out"):
        fit(tiny_run("steps=1"), tmp_path, watch=quiet())


def test_only_settings_that_do_not_affect_training_may_change_on_resume(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        fit(tiny_run(), tmp_path, watch=stop_after(5))
    with pytest.raises(ValueError, match=r"other settings: optim.lr was 0.001 and is 0.5, steps was 12 and is 99"):
        fit(tiny_run("optim.lr=0.5", "steps=99"), tmp_path, resume="auto", watch=quiet())
    fit(tiny_run("keep=1", "save_every=5", "evaluation.loops=1"), tmp_path, resume="auto", watch=quiet())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000012"]


def test_a_failed_checkpoint_ends_a_run_only_at_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, messages = checkpoints.save, list[str]()

    def full(directory: Path, step: int, *args: Any) -> Path:
        if step == 8:
            raise OSError(28, "No space left on device")
        return save(directory, step, *args)

    monkeypatch.setattr(checkpoints, "save", full)
    fit(tiny_run(), tmp_path, watch=quiet(messages))
    assert len(messages) == 1 and "step 8: checkpoint not written" in messages[0] and "No space left" in messages[0]
    monkeypatch.setattr(checkpoints, "save", lambda *args: full(tmp_path, 8))
    with pytest.raises(OSError, match=r"the last checkpoint was not written .*No space left.*--resume auto"):
        fit(tiny_run("save_every=12"), tmp_path / "last", watch=quiet(messages))


def test_a_failing_logger_costs_no_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def log(self, line: Any) -> None:
            if line["step"] == 6:
                raise RuntimeError("no network")

        def close(self) -> None:
            pass

    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    monkeypatch.setitem(loggers.LOGGERS, "wandb", lambda *args: Failing())
    messages = list[str]()
    fit(tiny_run("loggers=wandb"), tmp_path, watch=quiet(messages))
    assert messages == ["step 6: metrics not written (no network); Failing failed"]
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 13))


def test_the_last_checkpoint_is_written_before_a_failure_of_the_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = loggers.MetricsFile.log

    def full(self: loggers.MetricsFile, line: Any) -> None:
        if line["step"] == 12:
            raise OSError(28, "No space left on device")
        log(self, line)

    monkeypatch.setattr(loggers.MetricsFile, "log", full)
    with pytest.raises(OSError, match="No space left"):
        fit(tiny_run("save_every=7"), tmp_path, watch=quiet())
    assert (tmp_path / "checkpoints/step_00000012/manifest.json").is_file()


def test_an_unknown_logger_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown logger 'wandbb'; did you mean 'wandb'"):
        fit(tiny_run("loggers=wandbb"), tmp_path / "run", watch=quiet())
    fit(tiny_run(), tmp_path / "run", watch=quiet())


def test_a_run_that_diverges_writes_its_metrics_before_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 3, 4)
    with pytest.raises(TrainingError, match="2 steps in a row had non-finite loss or gradient, up to step 5"):
        fit(tiny_run("max_bad_steps=2"), tmp_path, watch=quiet())
    assert [line["loss"] is None for line in metrics(tmp_path)] == [False] * 3 + [True] * 2


def test_stretch_sets_the_rotary_factor_of_the_saved_model(tmp_path: Path) -> None:
    plain, stretched = (
        fit(tiny_run(f"stretch={factor}", "model.rope_context=4"), tmp_path / factor) for factor in "12"
    )
    a, b = OpenMythos.from_pretrained(plain), OpenMythos.from_pretrained(stretched)
    assert (a.cfg.rope_factor, b.cfg.rope_factor) == (1.0, 2.0)
    assert not torch.equal(a.embed.weight, b.embed.weight), "stretch had no effect on training"
    with pytest.raises(
        ValueError,
        match=r"stretch=2 sets model\.rope_factor after training, but it is already 3; use model\.rope_factor=1",
    ):
        tiny_run("stretch=2", "model.rope_factor=3")


def test_resuming_with_other_evaluation_settings_discards_the_old_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tiny_run(), tmp_path)
    assert Evaluation.load(tmp_path).grids[0].difficulties == [4]

    def interrupted(*_: Any, **__: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("open_mythos.training.fit.evaluate", interrupted)
        fit(tiny_run("evaluation.difficulties=5"), tmp_path, resume="auto")
    assert not (tmp_path / runs.EVALUATION).exists()
    fit(tiny_run("evaluation.difficulties=5"), tmp_path, resume="auto")
    assert Evaluation.load(tmp_path).grids[0].difficulties == [5]


@pytest.mark.parametrize("warmup, warns", [(2, False), (11, False), (12, True), (48, True)])
def test_a_warmup_as_long_as_the_run_is_warned_about(tmp_path: Path, warmup: int, warns: bool) -> None:
    messages: list[str] = []
    fit(tiny_run(f"optim.warmup={warmup}"), tmp_path / "run", watch=quiet(messages))
    warnings = [line for line in messages if "optim.warmup" in line]
    assert bool(warnings) == warns
    assert not warnings or f"the learning rate rises only to {12 / warmup:.0%} of optim.lr" in warnings[0]
