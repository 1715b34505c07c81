"""Which runs a comparison needs, and which settings are refused before the first of them."""

from __future__ import annotations

import pytest

from open_mythos.training import baselines
from open_mythos.training.plan import KINDS, Plan
from open_mythos.training.recipes import configured

TINY = ["steps=2", "gate.steps=0", "loops.maximum=2"]


def test_a_plan_describes_the_number_of_runs_before_any_starts(tmp_path):
    cfg = configured("debug", TINY)
    assert Plan(cfg, tmp_path).describe().startswith("15 runs: 5 kinds × 3 seeds; ")
    tuned = Plan(cfg, tmp_path, [4, 5], [1e-3, 3e-3, 1e-2])
    assert tuned.describe().startswith("20 runs: 5 kinds × (3 rates on seed 4 + 1 more seeds at the best); ")
    assert not list(tmp_path.iterdir())


def test_a_run_at_the_recipes_rate_is_shared_with_a_search_over_rates(tmp_path):
    cfg = configured("debug", [*TINY, "optim.optimizer=muon", "optim.muon_lr=2e-3"])
    plan = Plan(cfg, tmp_path, [0], [cfg.optim.lr, 4 * cfg.optim.lr])
    assert plan.run("wide", 0, cfg.optim.lr) == Plan(cfg, tmp_path).run("wide", 0, cfg.optim.lr)
    other = plan.of("wide", 0, 4 * cfg.optim.lr)
    assert plan.run("wide", 0, other.optim.lr).name == "wide-lr0.002-seed0"
    assert other.optim.muon_lr == pytest.approx(8e-3), "Muon's rate is scaled too"


@pytest.mark.parametrize("given, message", [
    ({"seeds": []}, "at least one"),
    ({"seeds": [1, 1]}, "seeds 1, 1: give each value only once"),
    ({"rates": [1e-3, 1e-3]}, "rates 0.001, 0.001: give each value only once"),
    ({"rates": [1e-3, float("nan")]}, "lr"),
    ({"rates": [-1e-3]}, "lr"),
])  # fmt: skip
def test_invalid_seeds_and_rates_are_refused(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Plan(configured("debug", TINY), tmp_path, **given)


def test_a_plan_whose_models_cannot_be_built_is_refused(tmp_path, monkeypatch):
    cfg = configured("debug", TINY)
    cfg.start = "parity"
    with pytest.raises(
        ValueError, match="start='parity': a comparison trains all kinds from new weights; leave it out"
    ):
        Plan(cfg, tmp_path)
    monkeypatch.setattr(baselines, "_MATCH", -1.0)
    with pytest.raises(ValueError, match=r"kind='wide': no width .* 2 loops .*use a larger model.dim"):
        Plan(configured("debug", [*TINY, "model.dim=24"]), tmp_path)


def test_kinds_are_the_looped_model_and_its_four_baselines():
    assert KINDS == ("looped", "single", "wide", "unrolled", "plain")
