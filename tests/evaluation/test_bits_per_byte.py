"""Bits per byte of a model whose probabilities are known."""

from __future__ import annotations

import math

import pytest
import torch
from counting import Copy, Counting
from torch import Tensor

from open_mythos.evaluation import depth
from open_mythos.evaluation.text import bits_per_byte, text_scores
from open_mythos.nn.exits import StableArgmax
from open_mythos.tasks.base import UNSCORED, Batch


class CopyText(Copy):
    """Token 1 stands for one byte, 2 for three; the first token of a window is not scored."""

    def windows(self, length: int, n: int) -> Batch:
        ids = self.batch(n, length, torch.Generator().manual_seed(0)).ids
        targets = ids.clone()
        targets[:, 0] = UNSCORED
        return Batch(ids, targets)

    def bytes_of(self, targets: Tensor) -> Tensor:
        assert (targets > 0).all()
        return 2 * targets - 1


@pytest.mark.parametrize("chunk", [7, 10_000])
def test_bits_per_byte_match_the_known_probabilities(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After n loops the logit of the answer is n and that of the two others 0; it is right where n > position."""
    monkeypatch.setattr(depth, "CHUNK", chunk)
    task, model = CopyText(), Counting().train()
    found = bits_per_byte(model, task, [6, 2], length=5, windows=20)
    targets = task.windows(5, 20).targets[:, 1:]
    n_bytes = (2 * targets - 1).sum().item()
    assert list(found) == [2, 6] and model.training
    right = math.log2(1 + 2 * math.exp(-6))
    assert found[6] == pytest.approx(20 * 4 * right / n_bytes, rel=1e-4)
    right, wrong = math.log2(1 + 2 * math.exp(-2)), math.log2(math.exp(2) + 2)
    assert found[2] == pytest.approx(20 * (right + 3 * wrong) / n_bytes), "only the first of four is right"


def test_text_scores_apply_the_exit() -> None:
    """A position stops as soon as it is right, so that its logit stays at position + 1."""
    task, model = CopyText(), Counting()
    found, used = text_scores(model, task, [50], length=5, windows=20, exit=StableArgmax())
    assert used == {50: 3}, "1 to 5 loops, and 50 without an exit"
    assert text_scores(model, task, [50], length=5, windows=20)[1] == {50: 50}
    nats = sum(20 * math.log(1 + 2 * math.exp(-n)) for n in (2, 3, 4, 5))
    assert found[50] == pytest.approx(nats / math.log(2) / task.bytes_of(task.windows(5, 20).targets[:, 1:]).sum())


def test_zero_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        bits_per_byte(Counting(), CopyText(), [1], length=5, windows=0)
