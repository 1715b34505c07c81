"""docs/costs.md: tables match the measurements of benchmarks/costs.py, and formulas match the code."""

from __future__ import annotations

import json
from typing import Any

import costs
import pytest
from pages import fill

from open_mythos.diagnostics import flops_per_token

RESULTS: dict[str, Any] = json.loads((costs.ROOT / "benchmarks" / "results" / "costs.json").read_text())


def test_tables_match_the_measurements() -> None:
    assert costs.markdown(RESULTS) in costs.PAGE.read_text()


def test_fill_replaces_the_tables() -> None:
    page = costs.PAGE.read_text()
    assert fill(page, costs.markdown(RESULTS)) == page
    assert "\nnew tables\n" in (filled := fill(page, "new tables")) and costs.markdown(RESULTS) not in filled


@pytest.mark.parametrize("sweep", costs.SWEEPS)
def test_a_row_of_every_table_can_be_measured(sweep: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "DIM", 64)
    monkeypatch.setattr(costs, "TRAINED", (2, 8))
    monkeypatch.setattr(costs, "READ", 16)
    line = costs.SWEEPS[sweep][0] | ({"context": 16} if sweep == "context" else {})
    found = costs.measure(sweep, line, seconds=0)
    assert found.keys() == RESULTS[sweep][0].keys()
    cfg = costs.shaped(64, line["attn"], line["experts"], line["loops"])
    cfg.halting = False
    assert found["flops"] == flops_per_token(cfg, line["loops"], 16) and found["decode"] > 0


def test_flops_follow_the_formulas_on_the_page() -> None:
    """The terms are those in the list on the page."""
    cfg = costs.shaped(256, "gqa", 8, 4)
    d, n = cfg.dim, 100
    projections, gate = 4 * d**2 + 4 * d * cfg.n_kv_heads * cfg.head_dim, 2 * d * 256 + 2 * 256
    block = projections + 4 * cfg.head_dim * n * cfg.n_heads + 6 * d * cfg.ffn_dim
    n_local = cfg.n_local_heads
    loop = projections + 4 * cfg.head_dim * ((cfg.n_heads - n_local) * n + n_local * cfg.local_window)
    loop += 6 * d * cfg.expert_dim * cfg.n_experts_per_tok + 6 * d * cfg.shared_dim + 2 * d * cfg.n_experts
    loop += 2 * d * cfg.lora_rank + gate
    once = 2 * cfg.vocab_size * d + 2 * block + 2 * d * cfg.lora_rank
    assert flops_per_token(cfg, 3, n) == once + 3 * loop
