"""benchmarks/dense.py: the two models have the stated sizes, and a toy run produces the table."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean

import dense
import pytest
from speed_worker import make_ready

from open_mythos.diagnostics import flops_per_token, parameters
from open_mythos.variants import DENSE_BITS, LOOPED_BITS, dense_beside, mythos_800k

RESULTS = dense.ROOT / "benchmarks" / "results" / "dense.json"


def test_dense_has_twice_the_parameters_and_the_flops_of_8_loops() -> None:
    assert parameters(dense.DENSE).total == pytest.approx(2 * parameters(dense.LOOPED).total, rel=0.01)
    looped, plain = flops_per_token(dense.LOOPED, 8, dense.CONTEXT), flops_per_token(dense.DENSE, 1, dense.CONTEXT)
    assert plain == pytest.approx(looped, rel=0.01)
    assert dense.DENSE.n_experts == 1 and dense.DENSE.n_local_heads == 0, "an ordinary Transformer"


def test_both_models_get_the_same_data_steps_and_optimizer() -> None:
    looped, plain = (dense.run_config(name, 1e-3, 0) for name in ("looped", "dense"))
    assert (looped.task, looped.optim, looped.steps, looped.batch_size) == (
        plain.task, plain.optim, plain.steps, plain.batch_size,
    )  # fmt: skip
    assert looped.depths == [1, 2, 4, 8] and plain.depths == [1]


def test_the_page_shows_the_measurements() -> None:
    assert dense.markdown(json.loads(RESULTS.read_text())) in dense.PAGE.read_text()


def test_the_quality_shown_beside_prices_is_the_measured_one() -> None:
    loss = json.loads(RESULTS.read_text())["loss"]
    for name, stated in (("looped", LOOPED_BITS), ("dense", DENSE_BITS)):
        assert stated == {int(n): round(mean(found), 3) for n, found in loss[name]["bits"].items()}
    longer = replace(mythos_800k(), max_seq_len=64, max_loop_iters=3)
    assert dense_beside(longer) == dense.DENSE and dense_beside(replace(longer, dim=192)) is None


def test_the_benchmark_runs_at_toy_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        name: replace(dense.MODELS[name][0], dim=32, n_heads=2, n_kv_heads=1, expert_dim=8) for name in dense.MODELS
    }
    monkeypatch.setattr(dense, "MODELS", {"looped": (small["looped"], (1, 2)), "dense": (small["dense"], (1,))})
    monkeypatch.setattr(dense, "TRAINED", (2, 8))
    monkeypatch.setattr(dense, "CONTEXT", 16)
    cfg = dense.run_config("looped", 1e-3, 0)
    cfg.steps, cfg.optim.warmup, cfg.evaluation.examples, cfg.evaluation.difficulties = 2, 1, 2, [8]
    found = dense.bits(cfg, tmp_path / "run")
    assert set(found) == {1, 2} and dense.bits(cfg, tmp_path / "run") == found, "an existing run is read"
    case = dense.case("memory", "memory")
    assert set(case.sides) == {"looped 1", "looped 2", "dense"}
    for task in case.sides.values():
        assert make_ready(asdict(task) | {"threads": 1})[1]()["growth MB"] >= 0
    alone = replace(case, sides={"dense": case.sides["dense"]}, ratios=[])  # each side starts a process
    monkeypatch.setattr(dense, "CASES", {"memory": alone})
    speed = dense.speeds(1, lambda what: None)
    assert speed["memory"]["dense"][0] > 0
    measured = {work: {side: [100.0] for side in case.sides} for work in ("train", "prefill", "decode", "memory")}
    measured["memory"] |= speed["memory"]
    bits = {"looped": {"1": [found[1]], "2": [found[2]]}, "dense": {"1": [3.0]}}
    at = {"name": "a machine", "torch": "2", "date": "2026-11-22", "load": 0.5}
    results = {
        "conditions": at,
        "loss": {name: {"rate": 1e-3, "bits": by} for name, by in bits.items()},
        "speed": measured,
    }
    lines = dense.markdown(results).splitlines()
    assert len(lines) == 7 and lines[4].startswith("| looped, 1 loop |") and f"{found[2]:.3f}" in lines[5]
