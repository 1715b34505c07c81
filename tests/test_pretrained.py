"""The shipped models load by name without a network, and their measured accuracy is that of their cards."""

from __future__ import annotations

import json
import platform

import pytest
import torch

from open_mythos import MythosConfig, OpenMythos, tasks
from open_mythos.checkpoint import SHIPPED, CheckpointError, shipped
from open_mythos.evaluation import DepthGrid, depth_grid
from open_mythos.evaluation.text import bits_per_byte
from open_mythos.training.runs import load_model, model_dir, training_config

TEXT = "text-tiny"
REASONERS = [name for name in shipped() if name != TEXT]


def figures(name: str) -> DepthGrid:
    return DepthGrid.from_dict(json.loads((SHIPPED / name / "figures.json").read_text()))


def test_shipped_models_exist_and_are_small():
    assert {"parity-tiny", "chain-sum-tiny", "p-hop-tiny", TEXT} <= set(shipped())
    for name in shipped():
        most = {"words-tiny": 6_000_000}.get(name, 1_000_000)
        assert (SHIPPED / name / "model.safetensors").stat().st_size <= most


@pytest.mark.parametrize("name", REASONERS)
def test_the_accuracy_on_the_card_is_reproduced(name):
    claimed, cfg = figures(name), training_config(name)
    task = tasks.load(cfg.task.name, **cfg.task.options).held_out()
    assert task.version == claimed.version, "the task has changed: measure the card again with benchmarks/ship.py"
    model = OpenMythos.from_pretrained(name)
    found = depth_grid(model, task, claimed.difficulties, claimed.loops, claimed.examples, claimed.seed)
    # The problems are the same; a few answers may depend on rounding, which differs between machines.
    torch.testing.assert_close(found.accuracy, claimed.accuracy, atol=0.01, rtol=0)
    torch.testing.assert_close(found.loops_used, claimed.loops_used, atol=0.5, rtol=0.02)


@pytest.mark.parametrize("name", REASONERS)
def test_the_card_shows_the_measured_figures(name):
    text, claimed = (SHIPPED / name / "README.md").read_text(), figures(name)
    for n, accuracies, used in zip(claimed.loops, claimed.accuracy.T, claimed.loops_used.T, strict=True):
        cells = (f"{a:.4f} ({u:.1f})" for a, u in zip(accuracies.tolist(), used.tolist(), strict=True))
        assert f"| {n} | {' | '.join(cells)} |" in text


def test_bits_per_byte_on_the_card_of_text_tiny_are_reproduced():
    claimed = json.loads((SHIPPED / TEXT / "figures.json").read_text())
    model, task = OpenMythos.from_pretrained(TEXT), tasks.load("text", split="held_out")
    assert task.version == claimed["version"] and model.embed.weight.dtype == torch.bfloat16
    bits = {int(n): found for n, found in claimed["bits_per_byte"].items()}
    found = bits_per_byte(model.float(), task, bits, claimed["length"], claimed["windows"])
    # The text is the standard library of the running Python.
    tolerance = 1e-3 if platform.python_version() == claimed["python"] else 0.1
    assert found == pytest.approx(bits, abs=tolerance)
    text = (SHIPPED / TEXT / "README.md").read_text()
    assert all(f"| {n} | {cell:.4f} |" in text for n, cell in bits.items())


def test_a_shipped_model_loads_by_name_unless_a_directory_has_that_name(tmp_path, monkeypatch):
    assert model_dir("parity-tiny") == SHIPPED / "parity-tiny"
    assert load_model("parity-tiny").cfg.halting
    monkeypatch.chdir(tmp_path)
    mine = OpenMythos(MythosConfig.load(SHIPPED / "parity-tiny" / "config.json"))
    mine.save_pretrained("parity-tiny")
    assert torch.equal(OpenMythos.from_pretrained("parity-tiny").embed.weight, mine.embed.weight)


def test_an_unknown_name_lists_the_shipped_models():
    with pytest.raises(CheckpointError, match="parity-tiny"):
        OpenMythos.from_pretrained("parity-huge")
