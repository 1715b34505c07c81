"""However processes divide a model and its batches, they make the steps of one process."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
from launch import assert_same, launch

LONG = bool(os.environ.get("OPEN_MYTHOS_LONG"))
STEPS = 5
LAYOUTS = {
    "FSDP": ("parallel.shard=4",),
    "FSDP + EP 2": ("parallel.shard=4", "parallel.expert=2"),
    "HSDP": ("parallel.shard=2", "parallel.replicate=2"),
    "EP 4": ("parallel.expert=4",),
    "TP 2": ("parallel.tensor=2", "parallel.shard=2"),
}
EACH, MUON, MLA = "loops.per=sequence", "optim.optimizer=muon", "model.attn_type=mla"
AGAIN, UNEVEN = "checkpoint_loops=true", ("loops.per=sequence", "loops.maximum=6", "loops.schedule=lognormal")
# by layout: what else is set
CHOSEN = {
    "FSDP + EP 2": (EACH, AGAIN, MUON),
    "HSDP": (MLA, "model.dropout=0.1", "model.state_noise=0.1", "accumulate=2"),
    "EP 4": (*UNEVEN, "loss.depth=uniform"),
    "TP 2": (EACH, MUON, "model.dense_dim=24"),
}
N_PLANS = 12


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """All that is run, in few groups of processes: they take longer to start than to train."""
    steps = {name: N_PLANS if name == "EP 4" else STEPS for name in CHOSEN}
    alone = [["trained", steps[name], *settings] for name, settings in CHOSEN.items()]
    four = [["trained", steps[name], *LAYOUTS[name], *settings] for name, settings in CHOSEN.items()]
    loops = [f"loops.{key}={n}" for n in (3,) for key in ("mean", "maximum")]
    fixed = ["loops.schedule=fixed", *loops, "loops.gradient=all", "loops.stale=0"]
    two = [
        ["between", STEPS, "parallel.shard=2", "parallel.expert=2", *CHOSEN["FSDP + EP 2"]],
        ["collectives", "parallel.shard=2", *fixed],
        ["collectives", "parallel.shard=2", AGAIN, "loss.depth=uniform", *fixed],
        ["collectives", "parallel.expert=2", *fixed],
        ["bypassed", "parallel.shard=2"],
        ["abandoned", "parallel.shard=2"],
    ]
    folder = tmp_path_factory.mktemp("found")
    one, many, pair = launch(folder, [(1, alone), (4, four), (2, two)])
    named = {("one", name): result for name, result in zip(CHOSEN, one, strict=True)}
    named |= {("four", name): result for name, result in zip(CHOSEN, many, strict=True)}
    keys = "between", "sharded", "again", "exchanged", "bypassed", "abandoned"
    return named | dict(zip(keys, pair, strict=True))


@pytest.mark.parametrize("layout", CHOSEN)
def test_four_processes_make_the_steps_of_one(found: dict[Any, Any], layout: str) -> None:
    assert_same(found["four", layout], found["one", layout])


def test_two_that_have_gone_on_from_a_state_make_the_steps_of_one(found: dict[Any, Any]) -> None:
    whole, half = found["one", "FSDP + EP 2"], found["between"]
    assert_same(half, whole | {"steps": whole["steps"][STEPS // 2 :]})


@pytest.mark.parametrize("case", ["sharded", "again"])
def test_a_unit_is_gathered_once_and_reduced_once(found: dict[Any, Any], case: str) -> None:
    """At three loops, with a readout after each, and where each is computed again."""
    counts = found[case]
    assert counts["units"] == 4  # prelude, core, coda and the rest
    assert counts["allgather_base"] == counts["reduce_scatter_base"] == counts["units"]


def test_a_loop_exchanges_numbers_rows_and_results_once_and_gradients_back(found: dict[Any, Any]) -> None:
    assert found["exchanged"]["alltoall_base"] == 3 * (3 + 2)


def test_a_lost_gradient_is_an_error(found: dict[Any, Any]) -> None:
    assert "recurrent.block.attn_norm.weight took part in the step and has no gradient" in found["bypassed"]


def test_a_process_that_does_not_come_is_named(found: dict[Any, Any]) -> None:
    said = found["abandoned"]
    assert "process 0 waited for process 1 in " in said and ", in step 2 (" in said and "parallel.timeout=3" in said


TABLE = list(itertools.product(("loops.schedule=fixed", EACH), ((), (AGAIN,)), ((), (MLA,)), ((), (MUON,))))


@pytest.mark.skipif(not LONG, reason="112 runs; OPEN_MYTHOS_LONG=1")
@pytest.mark.parametrize("settings", TABLE, ids=str)
def test_every_layout_makes_the_steps_of_one_process(settings: tuple[Any, ...], tmp_path: Path) -> None:
    loops, *rest = settings
    options = [loops, "loops.mean=3", "model.dense_dim=24", *itertools.chain(*rest)]
    two = [["parallel.shard=2"], ["parallel.expert=2"], ["parallel.tensor=2"]]
    groups = [(1, [[]]), (2, two), (4, list(map(list, LAYOUTS.values())))]
    jobs = [(n, [["trained", STEPS, *layout, *options] for layout in layouts]) for n, layouts in groups]
    (one,), *others = launch(tmp_path, jobs, timeout=1500)
    for result in itertools.chain(*others):
        assert_same(result, one)


@pytest.mark.skipif(not LONG, reason="200 plans; OPEN_MYTHOS_LONG=1")
@pytest.mark.parametrize("layout", ["EP 4", "FSDP + EP 2"])
def test_uneven_loops_never_hang(layout: str, tmp_path: Path) -> None:
    (one,), (four,) = launch(
        tmp_path, [(n, [["trained", 200, *of, *UNEVEN, "optim.lr=1e-4"]]) for n, of in ((1, ()), (4, LAYOUTS[layout]))],
        timeout=1500,
    )  # fmt: skip
    assert_same(four, one, 1e-4)  # rounding grows over 200 steps
