"""A run that four processes saved, dividing experts in two, goes on with any number that divide it in any way."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
from launch import launch

LONG = bool(os.environ.get("OPEN_MYTHOS_LONG"))
STEPS, MORE = 2, 2
SAVED = ("parallel.shard=4", "parallel.expert=2")
COMMON = ("batch_size=12", "model.n_experts=12", "loops.per=sequence", "model.dense_dim=24")
MUON = (*COMMON, "optim.optimizer=muon")
# by number of processes: what they divide
LAYOUTS: dict[int, list[tuple[str, ...]]] = {
    4: [SAVED, ("parallel.expert=4",), ("parallel.shard=2", "parallel.tensor=2"), ("parallel.shard=4",), ()],
    1: [()],
    2: [("parallel.shard=2", "parallel.expert=2"), ("parallel.shard=2",), ("parallel.expert=2",),
        ("parallel.tensor=2",), ()],
    3: [("parallel.shard=3",), ("parallel.expert=3",), ("parallel.shard=3", "parallel.expert=3"), ()],
}  # fmt: skip
CHOSEN = {4: LAYOUTS[4][1:2], 1: LAYOUTS[1], 2: LAYOUTS[2][:1], 3: LAYOUTS[3][:1]}


def gone_on(folder: Path, layouts: dict[int, list[tuple[str, ...]]], settings: tuple[str, ...]) -> list[Any]:
    """The losses that followed what was saved, and those of each layout after it has loaded that."""
    groups = [(n, [["loaded", MORE, "saved", *of, *settings] for of in given]) for n, given in layouts.items()]
    groups[0][1].insert(0, ["saved", STEPS, MORE, "saved", *SAVED, *settings])
    (expected, *of_four), *rest = launch(folder, groups, timeout=1500)
    return [expected, *itertools.chain(of_four, *rest)]


def assert_gone_on(found: list[Any]) -> None:
    expected, *results = found
    for result in results:
        assert not result["differing"] and result["n"] > 100
        assert result["losses"] == pytest.approx(expected, rel=1e-5)


def test_what_was_saved_by_four_processes_is_gone_on_with_by_one_two_three_and_four(tmp_path: Path) -> None:
    """Weights, averages, both optimizers' states, rows to start from: bit for bit; and the losses that follow."""
    found = gone_on(tmp_path, CHOSEN, MUON)
    assert len(found) == 5
    assert_gone_on(found)


@pytest.mark.skipif(not LONG, reason="15 layouts three times; OPEN_MYTHOS_LONG=1")
@pytest.mark.parametrize(
    "settings", [COMMON, MUON, (*MUON, "model.attn_type=mla", "checkpoint_loops=true")], ids=["adamw", "muon", "mla"]
)
def test_every_layout_goes_on_from_what_was_saved(tmp_path: Path, settings: tuple[str, ...]) -> None:
    found = gone_on(tmp_path, LAYOUTS, settings)
    assert len(found) == 16
    assert_gone_on(found)
