"""Training in any parallel layout takes the same steps as training in one process."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from launch import assert_resumed, assert_same, launch
from tiny import tiny_run

from open_mythos.planning.job import Job, Layout, Settings
from open_mythos.planning.sheet import Sheet

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
RECOMPUTED, UNEVEN = "checkpoint_loops=true", ("loops.per=sequence", "loops.maximum=6", "loops.schedule=lognormal")
WIDE = ("model.dense_dim=24", "model.vocab_size=4")  # sizes that two processes can divide
UNTIED = (*WIDE, "model.tied_head=false")
# by layout: number of processes, steps, other settings
CHOSEN = {
    "FSDP + EP 2": (4, STEPS, (EACH, RECOMPUTED, MUON)),
    "HSDP": (4, 3, (MLA, "model.dropout=0.1", "model.state_noise=0.1")),
    "EP 4": (4, 6, (*UNEVEN, "loss.depth=uniform")),
    "TP 2": (2, 3, (EACH, MUON, "accumulate=2", *WIDE)),
    "TP 2, untied head": (2, 3, (MLA, "loss.depth=uniform", "loss.chunk=3", "loss.z=0.1", *UNTIED)),
}


DISPATCHED = [(2, "float32"), (2, "bfloat16"), (0, "float64")]
RESUMED = {4: ("parallel.expert=4",), 1: (), 2: ("parallel.shard=2", "parallel.expert=2"), 3: ("parallel.shard=3",)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """The results of all jobs, run in few groups of processes, which take longer to start than to train."""
    fixed = ["loops.schedule=fixed", "loops.mean=3", "loops.gradient=all", "loops.stale=0"]
    jobs: dict[tuple[Any, ...], list[Any]] = {}
    for name, (n, steps, settings) in CHOSEN.items():
        jobs[1, name] = ["trained", steps, *settings]
        jobs[n, name] = ["trained", steps, *(LAYOUTS[name] if n == 4 else ["parallel.tensor=2"]), *settings]
    jobs |= {
        (2, "in_halves"): ["in_halves", STEPS, "parallel.shard=2", "parallel.expert=2", *CHOSEN["FSDP + EP 2"][2]],
        (2, "sharded"): ["collectives", "parallel.shard=2", *fixed],
        (2, "recomputed"): ["collectives", "parallel.shard=2", RECOMPUTED, "loss.depth=uniform", *fixed],
        (2, "exchanged"): ["collectives", "parallel.expert=2", *fixed],
        (2, "divided"): ["collectives", "parallel.tensor=2", *WIDE, *fixed],
        **{(2, case): ["dispatched", *case] for case in DISPATCHED},
        (2, "bypassed"): ["bypassed", "parallel.shard=2"],
    }
    elastic = ["batch_size=12", "model.n_experts=4", MUON, *WIDE]
    jobs[4, "saved"] = ["saved", 2, 2, "elastic", *LAYOUTS["FSDP + EP 2"], *elastic]
    jobs |= {(n, f"loaded by {n}"): ["loaded", 2, "elastic", *layout, *elastic] for n, layout in RESUMED.items()}
    jobs[1, "saved by one"] = ["saved", 2, 2, "alone", *elastic]
    jobs[2, "loaded from one"] = ["loaded", 2, "alone", *RESUMED[2], *elastic]
    jobs[2, "loaded by tensor"] = ["loaded", 2, "alone", "parallel.tensor=2", *elastic]
    jobs[2, "stopped"] = ["stopped", "stopped", "steps=9", "parallel.expert=2", "save_every=2"]
    jobs[2, "slow"] = ["slow", "parallel.shard=2"]
    jobs[2, "abandoned"] = ["abandoned", "parallel.shard=2"]  # comes last, since one of the two processes exits
    names = {n: [key for key in jobs if key[0] == n] for n in (4, 1, 2, 3)}
    results = launch(tmp_path_factory.mktemp("found"), [(n, [jobs[key] for key in keys]) for n, keys in names.items()])
    keys = itertools.chain(*names.values())
    return dict(zip((key if key[1] in CHOSEN else key[1] for key in keys), itertools.chain(*results), strict=True))


@pytest.mark.parametrize("layout", CHOSEN)
def test_a_layout_trains_like_one_process(found: dict[Any, Any], layout: str) -> None:
    assert_same(found[CHOSEN[layout][0], layout], found[1, layout])


def test_two_processes_that_resume_half_way_train_like_one(found: dict[Any, Any]) -> None:
    whole, half = found[1, "FSDP + EP 2"], found["in_halves"]
    assert_same(half, whole | {"steps": whole["steps"][STEPS // 2 :]})


@pytest.mark.parametrize("case", ["sharded", "recomputed"])
def test_an_fsdp_unit_is_gathered_and_reduced_once_per_step(found: dict[Any, Any], case: str) -> None:
    """With three loops; also with a readout after each, and with loops that are recomputed."""
    counts = found[case]
    assert counts["units"] == 4  # prelude, core, coda and the rest
    assert counts["allgather_base"] == counts["reduce_scatter_base"] == counts["units"]


def test_expert_parallelism_takes_two_all_to_alls_per_loop_and_direction(found: dict[Any, Any]) -> None:
    assert found["exchanged"]["alltoall_base"] == 3 * (2 + 2)


@pytest.mark.parametrize("case", DISPATCHED)
def test_experts_divided_among_processes_give_the_results_of_one(found: dict[Any, Any], case: tuple[int, str]) -> None:
    """Whether all tokens go to all processes or are counted first, and in any dtype, which also carries expert ids."""
    assert found[case] < {"float64": 1e-12, "float32": 1e-5, "bfloat16": 0.02}[case[1]]


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        ("sharded", Layout(shard=2, rows=4)), ("recomputed", Layout(shard=2, rows=4, recompute=True)),
        ("exchanged", Layout(replicate=2, expert=2, rows=4)),
    ],
)  # fmt: skip
def test_collectives_match_the_planning_sheet(found: dict[Any, Any], case: str, layout: Layout) -> None:
    counts, cfg, rows = found[case], tiny_run(), 0
    settings = Settings(precision="fp32", length=counts["length"], batch_size=cfg.batch_size, loops=3)
    planned, numbers = Counter[str](), Counter[str]()
    for one in Sheet(Job(cfg.model, 2, settings), layout).collectives:
        name = {"all_gather": "allgather_base", "all_to_all": "alltoall_base"}.get(one.kind, f"{one.kind}_base")
        planned[name] += one.count
        numbers[name] += one.count * int(one.bytes / 4) if one.kind != "all_to_all" else 0
        rows = int(one.bytes / 4) if one.of == "tokens" else rows
    del planned["all_reduce_base"]  # counted together with those of a few numbers at the end of a step
    for name, count in planned.items():
        assert counts[name] == count, name
        # shards of a matrix whose rows do not divide are padded; a gate that is not trained has no gradient
        assert name == "alltoall_base" or counts["numbers"][name] == pytest.approx(numbers[name], rel=0.05)
    assert counts["most"].get("alltoall_base", 0) == rows  # the size of the way back depends on the chosen experts


def test_all_reduces_of_tensor_parallelism_match_the_planning_sheet(found: dict[Any, Any]) -> None:
    counts, cfg = found["divided"], tiny_run(*WIDE)
    settings = Settings(precision="fp32", length=counts["length"], batch_size=cfg.batch_size, loops=3)
    planned = Sheet(Job(cfg.model, 2, settings), Layout(tensor=2, rows=8)).collectives
    assert {one.kind for one in planned} == {"all_reduce"}
    assert counts["allreduce"] == sum(one.count for one in planned) + 2  # experts' load; numbers at the end of a step


def test_a_used_parameter_without_a_gradient_is_an_error(found: dict[Any, Any]) -> None:
    assert "recurrent.block.attn_norm.weight took part in the step and has no gradient" in found["bypassed"]


def test_a_process_that_does_not_reach_a_step_is_named(found: dict[Any, Any]) -> None:
    error = found["abandoned"]
    assert "process 0 waited for process 1 in " in error and ", in step 2 (" in error and "parallel.timeout=3" in error


@pytest.mark.parametrize("n", RESUMED)
def test_a_background_checkpoint_of_four_processes_resumes_on_any_number(found: dict[Any, Any], n: int) -> None:
    assert_resumed(found[f"loaded by {n}"], found["saved"])


@pytest.mark.parametrize("job", ["loaded from one", "loaded by tensor"])
def test_a_checkpoint_of_one_process_resumes_on_two(found: dict[Any, Any], job: str) -> None:
    assert_resumed(found[job], found["saved by one"])


def test_a_signal_to_one_process_ends_all_with_its_exit_code(found: dict[Any, Any]) -> None:
    assert found["stopped"] == [129, 129]


def test_step_results_hold_the_number_and_busy_time_of_every_process(found: dict[Any, Any]) -> None:
    (first, quick), (second, slow) = found["slow"]
    assert (first, second) == (0, 1) and slow >= 0.2 and quick < slow - 0.1


TABLE = list(itertools.product(("loops.schedule=fixed", EACH), ((), (RECOMPUTED,)), ((), (MLA,)), ((), (MUON,))))
PAIRS = [("parallel.shard=2",), ("parallel.expert=2",), ("parallel.tensor=2",)]
GROUPS = [(1, [()]), (2, PAIRS), (4, list(LAYOUTS.values()))]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[Any]]:
    """The results of each layout in ``GROUPS``, by settings."""
    jobs = [(n, list(itertools.product(TABLE, layouts))) for n, layouts in GROUPS]
    options = {case: [case[0], "loops.mean=3", *WIDE, *itertools.chain(*case[1:])] for case in TABLE}
    groups = [(n, [["trained", STEPS, *layout, *options[case]] for case, layout in pairs]) for n, pairs in jobs]
    results = launch(tmp_path_factory.mktemp("table"), groups, timeout=6000)
    found: dict[Any, list[Any]] = {case: [] for case in TABLE}
    for (_, pairs), group in zip(jobs, results, strict=True):
        for (case, _), result in zip(pairs, group, strict=True):
            found[case].append(result)
    return found


@pytest.mark.skipif(not LONG, reason="144 runs; OPEN_MYTHOS_LONG=1")
@pytest.mark.parametrize("settings", TABLE, ids=str)
def test_every_layout_trains_like_one_process(table: dict[Any, list[Any]], settings: tuple[Any, ...]) -> None:
    one, *others = table[settings]
    assert len(others) == 8
    for result in others:
        assert_same(result, one)


@pytest.mark.skipif(not LONG, reason="200 plans; OPEN_MYTHOS_LONG=1")
@pytest.mark.parametrize("layout", ["EP 4", "FSDP + EP 2"])
def test_uneven_loops_never_hang(layout: str, tmp_path: Path) -> None:
    (one,), (four,) = launch(
        tmp_path, [(n, [["trained", 200, *of, *UNEVEN, "optim.lr=1e-4"]]) for n, of in ((1, ()), (4, LAYOUTS[layout]))],
        timeout=1500,
    )  # fmt: skip
    assert len(four["steps"]) == 200
    for mine, theirs in zip(four["steps"][:100], one["steps"], strict=False):  # later, rounding may change experts
        assert mine[0] == pytest.approx(theirs[0], rel=1e-5)
