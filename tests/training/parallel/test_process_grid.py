"""Which process has which rows and weights, and layouts that are refused."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_run

from open_mythos.training import distributed
from open_mythos.training.parallel.grid import Grid
from open_mythos.training.trainer import Trainer


def grid(monkeypatch: pytest.MonkeyPatch, n: int, rank: int = 0, **sizes: int) -> Grid:
    monkeypatch.setenv("WORLD_SIZE", str(n))
    monkeypatch.setenv("RANK", str(rank))
    return Grid(tiny_run("batch_size=16", *(f"parallel.{name}={size}" for name, size in sizes.items())))


def test_every_row_belongs_to_one_tensor_group(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [grid(monkeypatch, 8, rank, shard=2, tensor=2) for rank in range(8)]
    assert [one.data for one in made] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {(one.n_data, one.replicate) for one in made} == {(4, 2)}


def test_beside_gives_the_rows_that_an_expert_group_runs_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 rows of four processes in two expert groups; each process runs the first two of its four rows."""
    for rank, expected in ((0, [0, 1, 4, 5]), (1, [0, 1, 4, 5]), (2, [8, 9, 12, 13]), (3, [8, 9, 12, 13])):
        rows = slice(4 * rank, 4 * rank + 2)
        assert grid(monkeypatch, 4, rank, expert=2).beside(rows, 16).tolist() == expected


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"shard": 3}, "4 processes are not a multiple of parallel.shard=3 x parallel.tensor=1; start a multiple of 3"),
        ({"shard": 2, "replicate": 4}, r"replicate=4 .* are 8 processes, but there are 4; use parallel.replicate=2"),
        (
            {"expert": 3},
            "parallel.expert=3 does not fit 4 processes with parallel.shard=1; use a divisor of both",
        ),
    ],
)
def test_layouts_that_do_not_divide_the_processes_are_refused(
    sizes: dict[str, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=message):
        grid(monkeypatch, 4, **sizes)


def test_different_versions_of_torch_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = grid(monkeypatch, 2)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "gathered", lambda mine: [mine, "2.11.0"])
    with pytest.raises(ValueError, match=r"process 1 has torch 2\.11\.0 and process 0 .*; install one version"):
        made.connect(torch.device("cpu"), 60)


def test_other_processes_exit_when_the_first_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[float] = []

    def add_up(numbers: list[float]) -> list[float]:
        sent.extend(numbers)
        return [1.0]

    monkeypatch.setattr(distributed, "add_up", add_up)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(OSError, match="no corpus"), distributed.first_process_first():
        raise OSError("no corpus")
    assert sent == [1.0]
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit), distributed.first_process_first():
        pass


def test_a_checkpoint_of_an_earlier_version_loads() -> None:
    """It had buffers and random generators of each process, and carried states that belong to no row."""
    trainer = Trainer(tiny_run())
    for _ in range(2):
        trainer.step()
    state = trainer.state_dict()
    carried = {"buffers": state.pop("buffers"), "objective": {"left": torch.stack(list(state.pop("left").values()))}}
    state["processes"] = [{"carried": carried, "torch": torch.get_rng_state(), "cuda": None}] * 4
    del state["config"]["parallel"]
    other = Trainer(tiny_run("seed=1"))
    other.load_state_dict(state)
    assert other.step_number == 2 and not other.objective.left
    for name, buffer in trainer.model.named_buffers():
        assert torch.equal(buffer, other.model.get_buffer(name)), name
    for name, weights in trainer.parallel.held.items():
        assert torch.equal(weights, other.parallel.held[name]), name
    assert not other.step().skipped
