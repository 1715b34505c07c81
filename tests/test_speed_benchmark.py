"""benchmarks/speed.py: compared sides do the same work, ratios are right, and missing measurements are reported."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import speed
import speed_worker
import torch
from helpers import TINY, assert_near, tokens
from rich.console import Console
from speed_cases import CASES, DENSE, SHAPE, Case, Task, llama_config, llama_flops

from open_mythos import MythosConfig
from open_mythos.diagnostics import flops_per_token, flops_per_trained_token
from open_mythos.generation.fused import why_not_fused

MODEL = {name: value for name, value in TINY.items() if name != "halting"}
HERE = {"ours": Path(sys.executable)}


def quiet(what: str) -> None:
    pass


def test_cases_cover_all_workloads_and_ratios_refer_to_their_sides() -> None:
    works = {task.work for case in CASES.values() for task in case.sides.values()}
    assert works == set(speed_worker.WORKS)
    for case in CASES.values():
        assert all(set(pair) <= case.sides.keys() for pair in case.ratios)


@pytest.mark.parametrize("changes", [DENSE, {}])
@pytest.mark.parametrize("training", [True, False])
def test_the_llama_baseline_has_as_many_flops(changes: dict[str, Any], training: bool) -> None:
    model = SHAPE | changes
    llama = llama_config(model, 8, 512, training)
    cfg = MythosConfig(**model)
    ours = flops_per_trained_token(cfg, 8, 512) / 3 if training else flops_per_token(cfg, 8, 512)
    assert llama_flops(llama, 256.5 if training else 512) == pytest.approx(ours, rel=0.02)
    assert llama["num_hidden_layers"] == 10


def test_llama_flops_are_those_of_its_linear_layers() -> None:
    transformers = pytest.importorskip("transformers")
    config = llama_config(SHAPE, 8, 512, training=True)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert llama_flops(config, 0) == 2 * weights


def test_ratios_are_computed_per_repetition() -> None:
    sides = {"a": {"tokens/s": [10.0, 40.0, 90.0], "parameters": 1}, "b": {"tokens/s": [10.0, 20.0, 30.0]}}
    assert speed.ratio(sides, "a", "b") == {"of": "a", "to": "b", "tokens/s": [2.0, 1.0, 3.0]}


def test_sides_run_with_the_given_instructions_and_missing_ones_are_left_out() -> None:
    ours = Task("ours", "train", MODEL, loops=2, batch=2, tokens=8)
    sides = {
        "ours": ours, "ours, recomputed": replace(ours, recompute=True), "ours, bf16": replace(ours, bf16=True),
        "reference": replace(ours, side="reference"),
    }  # fmt: skip
    case = Case("training", sides, [("ours", name) for name in sides if name != "ours"])
    found = speed.measure(case, HERE, threads=1, repeat=3, say=quiet, environment=speed.AVX2)
    assert found["left_out"] == {"reference": "no interpreter for reference"}
    assert [len(side["tokens/s"]) for side in found["sides"].values()] == [3, 3]
    assert {side["capability"] for side in found["sides"].values()} == {"AVX2"}
    assert [(entry["of"], entry["to"]) for entry in found["ratios"]] == [("ours", "ours, recomputed")]
    at = {"name": "a machine", "instructions": "AVX2", "threads": 1, "cores": 2, "torch": "2"}
    table = speed.markdown({"AVX2": {"conditions": at, "results": {"train": found}}})
    start = "| training | OpenMythos / OpenMythos, loops recomputed |"
    (row,) = [line for line in table.splitlines() if line.startswith(start)]
    assert row.count("not measured") == 1 and row.endswith("tokens/s | 4 / 4 experts used |")
    assert "**AVX-512**: not measured" in table and f"torch 2, {found['date']}. Not measured:" in table


def test_the_page_shows_the_measurements_of_each_kind_of_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = speed.measured()
    assert speed.markdown(kinds) in speed.PAGE.read_text()
    for kind, path in speed.RESULTS.items():
        assert (kind in kinds) == path.is_file()
    one = json.loads(speed.RESULTS["AVX-512"].read_text())
    both = speed.markdown({"AVX-512": one, "AVX2": one}).splitlines()
    assert len(both) == len(speed.markdown({"AVX-512": one}).splitlines()), "one row for both"
    rows = [line.split(" | ") for line in both[5:]]
    assert rows and all(row[2:4] == row[4:6] for row in rows)
    page = tmp_path / "speed.md"
    page.write_text(speed.PAGE.read_text())
    monkeypatch.setattr(speed, "PAGE", page)
    monkeypatch.setattr(speed, "RESULTS", {kind: tmp_path / f"{kind}.json" for kind in speed.RESULTS})
    monkeypatch.setattr(sys, "argv", ["speed.py", "--markdown"])
    (tmp_path / "AVX2.json").write_text(json.dumps(one))
    speed.main()
    assert page.read_text().count("- **AVX-512**: not measured.") == 1


def test_a_side_without_a_counterpart_is_shown() -> None:
    sides = {"ours": {"tokens/s": [4321.0]}}
    found = {"what": "training", "sides": sides, "ratios": [], "left_out": {"reference": "gone"}}
    console = Console(record=True, width=100)
    speed.show(found, console)
    shown = console.export_text()
    assert "4,321 tokens/s" in shown and "left out: reference: gone" in shown


def test_memory_is_measured_in_a_new_process_each_time() -> None:
    sides = {"ours": Task("ours", "memory", MODEL | {"max_seq_len": 256}, 8, 8, 256)}
    found = speed.measure(Case("memory", sides, []), HERE, threads=1, repeat=2, say=quiet)
    growth = found["sides"]["ours"]["growth MB"]
    assert len(growth) == 2 and min(growth) > 0.5 * max(growth)  # in one process the second step would add nothing


def test_a_failing_side_reports_its_error() -> None:
    case = Case("broken", {"ours": Task("ours", "train", MODEL | {"dim": 31}, 2, 2, 8)}, [])
    with pytest.raises(RuntimeError, match="dim=31 is not divisible"):
        speed.measure(case, HERE, threads=1, repeat=1, say=quiet)


def test_a_missing_interpreter_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="is no file"):
        speed.reference_python(tmp_path / "python", quiet)


# -- the worker's calls, in this process


@pytest.mark.parametrize("changes", [dict(bf16=True), dict(work="prefill"), dict(work="decode")], ids=str)
def test_a_repetition_measures_tokens_per_second(changes: dict[str, Any]) -> None:
    task = replace(Task("ours", "train", MODEL, loops=2, batch=1, tokens=8), **changes)
    built, repetition = speed_worker.make_ready(asdict(task) | {"threads": 1})
    assert built["parameters"] > 0 and repetition()["tokens/s"] > 0


@pytest.mark.parametrize("engine", ["modules", "fused"])
def test_stepwise_decoding_gives_the_logits_of_one_pass(engine: str) -> None:
    side, ids = speed_worker.Ours(MODEL, 3, engine), tokens(1, 9)
    side.model.eval()
    with torch.inference_mode():
        whole, held = side.logits(ids), side.read(ids[:, :6])
        assert_near(side.prefill(ids[:, :6])[:, 0], whole[:, 5])
        for _ in range(2):
            held = side.rewound(held, 6)
            found = [side.next(ids[:, i : i + 1], held, i) for i in range(6, 9)]
            assert_near(torch.stack(found, 1), whole[:, 6:])


def test_the_engine_modules_keeps_the_fused_engine_from_being_chosen() -> None:
    assert why_not_fused(speed_worker.Ours(MODEL, 3).model)
    assert not why_not_fused(speed_worker.Ours(MODEL, 3, "auto").model)


def test_recomputed_loops_give_the_same_logits() -> None:
    side, ids = speed_worker.Ours(MODEL, loops=3), tokens(2, 9)
    assert_near(side.logits_recomputed(ids), side.logits(ids))


@pytest.mark.parametrize("seed", range(4))
def test_spread_experts_balances_a_collapsed_router(seed: int) -> None:
    torch.manual_seed(seed)
    side, ids = speed_worker.Ours(MODEL | {"n_experts": 16}, loops=2), tokens(8, 16)
    with torch.no_grad():
        side.model.embed.weight.mul_(0.1).add_(torch.randn(MODEL["dim"]))  # all tokens nearly equal
    collapsed = speed_worker.experts_used(side, ids)
    assert collapsed < 10
    speed_worker.spread_experts(side, ids)
    assert speed_worker.experts_used(side, ids) > max(12, 1.5 * collapsed)  # of 16
