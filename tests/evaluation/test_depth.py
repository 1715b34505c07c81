"""Accuracy by loops from one pass equals that of a separate pass for each number of loops."""

from __future__ import annotations

import pytest
import torch

from open_mythos import MythosConfig, OpenMythos
from open_mythos.evaluation import accuracy_by_loops


@pytest.fixture
def model() -> OpenMythos:
    torch.manual_seed(0)
    return OpenMythos(MythosConfig(
        vocab_size=5, dim=16, n_heads=2, n_kv_heads=1, max_seq_len=16, max_loop_iters=4,
        prelude_layers=1, coda_layers=1,
        attn_type="gqa", n_experts=2, n_shared_experts=1, n_experts_per_tok=1, expert_dim=8, lora_rank=2,
    ))  # fmt: skip


@pytest.mark.parametrize("gate", [0.0, 0.4, 1.0])
def test_one_pass_equals_separate_passes(model: OpenMythos, gate: float) -> None:
    model.recurrent.act.forward = lambda h: torch.full(h.shape[:2], gate)  # type: ignore[method-assign]
    ids, targets = torch.randint(0, 5, (4, 12)), torch.randint(0, 5, (4, 12))
    found = accuracy_by_loops(model, ids, targets, [8, 1, 3])
    assert model.training and list(found) == [1, 3, 8]
    model.eval()
    for n, accuracy in found.items():
        assert accuracy == pytest.approx((model(ids, n_loops=n).argmax(-1) == targets).float().mean().item())


def test_unscored_positions_do_not_count(model: OpenMythos) -> None:
    ids = torch.randint(0, 5, (4, 12))
    with torch.no_grad():
        targets = model.eval()(ids, n_loops=2).argmax(-1)
    targets[:, ::2] = -100
    assert accuracy_by_loops(model, ids, targets, [2]) == {2: 1.0}


@pytest.mark.parametrize("loops", [[], [0, 2]])
def test_invalid_loops_are_refused(model: OpenMythos, loops: list[int]) -> None:
    with pytest.raises(ValueError, match="loops="):
        accuracy_by_loops(model, torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64), loops)


def test_targets_without_scored_positions_are_refused(model: OpenMythos) -> None:
    with pytest.raises(ValueError, match="targets is -100 everywhere, so no position is scored"):
        accuracy_by_loops(model, torch.zeros(1, 2, dtype=torch.int64), torch.full((1, 2), -100), [1])
