"""Training on text of separate documents: resuming, in one process or several, and what a run saves."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_fit import Stopped, assert_same_run, metrics, quiet, stop_after
from tiny import tiny_run

from open_mythos.evaluation.text import bits_per_byte
from open_mythos.tasks.text import Text
from open_mythos.tasks.tokenizer import Tokenizer
from open_mythos.training import runs
from open_mythos.training.config import TrainConfig
from open_mythos.training.fit import fit, load_evaluation
from open_mythos.training.recipes import configured
from open_mythos.training.trainer import Trainer

PROCESS = """
import sys
from contextlib import suppress
from pathlib import Path
import torch
from open_mythos.training import distributed
from open_mythos.training.config import TrainConfig
from open_mythos.training.fit import Watch, fit
from open_mythos.training.trainer import Trainer

torch.set_num_threads(1)
cfg, run, step = TrainConfig.load(sys.argv[1]), Path(sys.argv[2]), Trainer.step
def stopping(trainer, *say):
    if trainer.step_number == 6:
        raise InterruptedError
    return step(trainer, *say)
with distributed.processes():
    Trainer.step = stopping
    with suppress(InterruptedError):
        fit(cfg, run)
    Trainer.step = step
    fit(cfg, run, resume="auto")
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text(f"the same weights, run for {i} loops, think deeper\n" * (i % 5 + 1))
    return folder


def text_run(corpus: Path, *overrides: str) -> TrainConfig:
    return tiny_run(
        "task.name=text", f"task.options.source={corpus}", "task.options.separate=true", "task.min_difficulty=24",
        "task.max_difficulty=24", "evaluation.difficulties=24", "model.vocab_size=300", "loops.stale=0", *overrides,
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole")
    fit(text_run(corpus), run, watch=quiet())
    return run


def test_a_stopped_and_resumed_text_run_equals_an_uninterrupted_one(
    corpus: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    messages: list[str] = []
    with pytest.raises(Stopped):
        fit(text_run(corpus), tmp_path, watch=stop_after(6))
    fit(text_run(corpus), tmp_path, resume="auto", watch=quiet(messages))
    assert_same_run(uninterrupted, tmp_path)
    assert "documents of" in messages[-1] and "rows of 24" in messages[-1]


def test_consecutive_steps_read_consecutive_rows_of_the_text(corpus: Path) -> None:
    trainer = Trainer(text_run(corpus))
    assert isinstance(trainer.task, Text)
    for step in range(3):
        wanted = trainer.task.rows(range(8 * step, 8 * step + 8), 24, seed=0)
        assert torch.equal(trainer.draw()[0].batch.ids, wanted.ids)
        trainer.step()


def test_resuming_on_text_that_has_changed_is_refused(uninterrupted: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for i in range(9):
        (tmp_path / "corpus" / f"{i}.txt").write_text("what was there\n" * (i + 1))
    with pytest.raises(Stopped):
        fit(text_run(tmp_path / "corpus"), tmp_path / "run", watch=stop_after(5))
    (tmp_path / "corpus/0.txt").write_text("what is there now")
    with pytest.raises(ValueError, match=r"the text at source=.* has changed since the checkpoint was saved"):
        fit(text_run(tmp_path / "corpus"), tmp_path / "run", resume="auto", watch=quiet())


def test_a_run_saves_its_tokenizer_and_is_evaluated_with_it(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    fit(text_run(corpus, "task.options.tokenizer=bpe:280", "steps=2"), tmp_path, watch=quiet())
    cfg, kept = runs.training_config(tmp_path), runs.tokenizer_of(tmp_path)
    assert kept.pieces == Text(**cfg.task.options).store.tokenizer.pieces  # type: ignore[union-attr]
    options = runs.held_out_options(tmp_path, cfg)
    assert options == {"split": "held_out", "tokenizer": str(tmp_path / "model")}
    found = bits_per_byte(runs.load_model(tmp_path), Text(**cfg.task.options | options), [1, 2], 24, 4)
    assert found == pytest.approx(load_evaluation(tmp_path))


def test_two_processes_train_like_one(corpus: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """With a model of load-balanced experts, stopped half way and resumed."""
    cfg = text_run(corpus)
    cfg.save(tmp_path / "cfg.json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in ("0", "1"):  # as torchrun starts them
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-c", PROCESS, str(tmp_path / "cfg.json"), str(tmp_path / "run")]
        started.append(subprocess.Popen(command, env=os.environ | env, stderr=subprocess.PIPE, text=True))
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    for mine, theirs in zip(metrics(tmp_path / "run"), metrics(uninterrupted), strict=True):
        for key in ("step", "loss", "accuracy", "grad_norm", "loops", "expert_balance"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-3), (mine["step"], key)
    fit(cfg, tmp_path / "alone", resume=str(tmp_path / "run/checkpoints/step_00000008"), watch=quiet())
    for mine, theirs in zip(metrics(tmp_path / "alone"), metrics(uninterrupted)[8:], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3), mine["step"]


def test_a_batch_that_does_not_divide_among_processes_is_refused(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="batch_size=8 with accumulate=1 cannot be split among 3 processes; use a mu"):
        Trainer(text_run(corpus))


def test_paths_in_a_config_do_not_depend_on_the_current_directory(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.load_model("text-tiny").save_pretrained(corpus.parent / "looped")
    Tokenizer().save(corpus.parent / "looped")
    monkeypatch.chdir(corpus.parent)
    there = configured("heal", ["start=looped", f"data={corpus.name}/*.txt", "loss.teacher=looped"])
    monkeypatch.chdir(tmp_path)
    up = os.path.relpath(corpus.parent)
    here = configured("heal", [f"start={up}/looped", f"data={up}/{corpus.name}/*.txt", f"loss.teacher={up}/looped"])
    assert here == there and Path(here.start).is_absolute()
    assert configured("text", ["start=text-tiny"]).start == "text-tiny", "the name of a shipped model is not a path"
    assert runs.everywhere(f"hf:{up}:part") == f"hf:{corpus.parent}:part" and runs.everywhere("hf:a/b") == "hf:a/b"


def test_short_keys_set_the_options_of_text_recipes(corpus: Path) -> None:
    cfg = configured("text", [f"data={corpus}", "length=64", "tokenizer=bytes"])
    assert cfg.task.options == {"source": str(corpus), "separate": True, "tokenizer": "bytes"}
    assert (cfg.task.min_difficulty, cfg.task.max_difficulty, cfg.evaluation.difficulties) == (64, 64, [64])
    with pytest.raises(ValueError, match="data= is only for text recipes; parity generates its own problems"):
        configured("parity", ["data=x"])
    with pytest.raises(ValueError, match=r"rows of text have one length; use task.min_difficulty=99"):
        Trainer(text_run(corpus, "task.max_difficulty=99"))
    with pytest.raises(ValueError, match=r"model.vocab_size=100, but text has 257 tokens"):
        Trainer(text_run(corpus, "model.vocab_size=100"))
