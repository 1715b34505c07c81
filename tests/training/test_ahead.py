"""Batches of text: each process reads its own rows, one step ahead, and a resumed run reads the rows that come next."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from test_fit import quiet
from tiny import tiny_run

from open_mythos.tasks import Batch
from open_mythos.tasks.store import Tokens
from open_mythos.tasks.text import Text
from open_mythos.training.ahead import Ahead
from open_mythos.training.config import TrainConfig
from open_mythos.training.fit import fit
from open_mythos.training.trainer import Trainer

LENGTH = 24


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run on a mixture of two texts, weighted 2 to 1."""
    here = tmp_path_factory.mktemp("mixed")
    for name in ("one", "other"):
        (here / name).mkdir()
        for i in range(30):
            (here / name / f"{i:02d}.txt").write_text(f"{name}: the same weights, run for {i} loops\n" * (i % 5 + 1))
    return tiny_run(
        "task.name=text", f"task.options.source={here}/one:2,{here}/other:1", "task.options.separate=true",
        f"task.min_difficulty={LENGTH}", f"task.max_difficulty={LENGTH}", f"evaluation.difficulties={LENGTH}",
        "model.vocab_size=300", "steps=8",
    )  # fmt: skip


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True)) and one.n_scored == other.n_scored


def batches_of_all(cfg: TrainConfig, n: int, steps: range, patch: pytest.MonkeyPatch) -> list[Batch]:
    """The batches of ``steps``, each joined from what the ranks of ``n`` processes draw, in the order of the ranks."""
    patch.setenv("WORLD_SIZE", str(n))
    drawn = []
    for rank in range(n):
        patch.setenv("RANK", str(rank))
        trainer = Trainer(cfg)
        drawn.append([])
        for trainer.step_number in steps:
            drawn[-1].append(trainer.draw()[0].batch)
            assert len(drawn[-1][-1].ids) == cfg.batch_size // n
    found = []
    for parts in zip(*drawn, strict=True):
        assert len({part.n_scored for part in parts}) == 1
        whole = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
        found.append(Batch(*whole, n_scored=parts[0].n_scored))
    return found


def test_batches_are_the_same_for_any_number_of_processes_and_start_step(
    mixed: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, task = batches_of_all(mixed, 1, range(8), monkeypatch), Text(**mixed.task.options)
    for step, batch in enumerate(whole):
        assert same(batch, Batch(*task.rows(range(8 * step, 8 * step + 8), LENGTH), n_scored=batch.n_scored))
        assert batch.n_scored == int((batch.targets >= 0).sum()), "n_scored is known without reading the batch"
    assert len({batch.n_scored for batch in whole}) > 1, "some batches should have rows that are not full"
    for n, steps in ((2, range(8)), (4, range(5, 8))):
        assert all(map(same, batches_of_all(mixed, n, steps, monkeypatch), whole[steps.start :]))


def test_a_process_reads_its_own_rows_only(mixed: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "1")
    trainer, read, get = Trainer(mixed), list[np.ndarray](), Tokens.__getitem__
    monkeypatch.setattr(Tokens, "__getitem__", lambda self, where: read.append(where) or get(self, where))
    trainer.draw()
    assert trainer.ahead is not None and trainer.ahead._next is not None
    trainer.ahead._next[1].result()
    assert [where.shape for where in read] == [(2, LENGTH + 1)] * 2, "one read for this step, one for the next"


def test_a_run_on_a_mixture_of_texts_resumes_bit_for_bit(mixed: TrainConfig) -> None:
    one = Trainer(mixed)
    losses = [one.step().loss for _ in range(3)]
    state = copy.deepcopy(one.state_dict())
    losses += [one.step().loss for _ in range(3)]
    other = Trainer(mixed)
    other.step()  # the batch that this prepares for the next step must not be used
    other.load_state_dict(state)
    assert [other.step().loss for _ in range(3)] == losses[3:]
    assert all(map(torch.equal, one.model.state_dict().values(), other.model.state_dict().values()))


def test_the_next_batch_is_prepared_in_another_thread_during_a_step() -> None:
    made, by = list[int](), list[str]()
    ready = threading.Event()

    def make(step: int) -> Batch:
        made.append(step)
        by.append(threading.current_thread().name)
        if step == 1:
            ready.set()
        if step == 3:
            raise OSError("torn")
        return Batch(torch.full((1, 1), step), torch.zeros(1, 1))

    ahead = Ahead(make)
    assert ahead(0).ids.item() == 0 and ready.wait(5), "batch 1 is prepared before it is requested"
    assert by[0] == threading.current_thread().name != by[1]
    assert ahead(1).ids.item() == 1 and ahead(2).ids.item() == 2 and ahead(7).ids.item() == 7, "any step may follow"
    assert ahead(2).ids.item() == 2
    with pytest.raises(OSError, match="torn"):
        ahead(3)


def test_a_run_reports_the_epochs_of_each_source(mixed: TrainConfig, tmp_path: Path) -> None:
    messages: list[str] = []
    fit(mixed, tmp_path, watch=quiet(messages))
    sources = mixed.task.options["source"].split(",")
    lines = {line.partition(": ")[0]: line for line in messages if "epochs" in line}
    assert list(lines) == [source[:-2] for source in sources]
    rows = {name: round(int(line.split(": ")[1].split()[0].replace(",", "")) / LENGTH) for name, line in lines.items()}
    assert sum(rows.values()) == pytest.approx(64, abs=6) and max(rows.values()) > min(rows.values())
