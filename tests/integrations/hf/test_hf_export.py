"""A checkpoint of a run, exported as the model folder that the run would have written at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_near
from tiny import tiny_run
from transformers import AutoModelForCausalLM

import open_mythos.integrations.hf  # noqa: F401 (registers with the Auto classes)
from open_mythos import OpenMythos, weights
from open_mythos.integrations.hf.export import export
from open_mythos.training import checkpoints
from open_mythos.training.checkpoints import Part, Stored
from open_mythos.training.fit import Watch, averaged, fit


def sharded(state: dict[str, Any]) -> dict[str, Any]:
    """The state as several processes save it."""
    average = {n: Part(x, tuple(x.shape), (0,) * x.ndim, True) for n, x in state["trainer"]["ema"]["average"].items()}
    return state | {"trainer": state["trainer"] | {"ema": {"average": average}}}


def test_an_exported_checkpoint_has_the_tensors_of_its_runs_model(tmp_path: Path) -> None:
    run = fit(tiny_run("steps=1", "stretch=2"), tmp_path / "run", watch=Watch(log=lambda message: None)).parent
    (whole,) = checkpoints.newest_first(run / "checkpoints")
    divided, expected = (
        checkpoints.save(tmp_path, 2, sharded(checkpoints.load(whole)), 1),
        OpenMythos.from_pretrained(run),
    )
    for source, kind in (whole, torch.Tensor), (divided, Stored):
        core, tensors, _ = averaged(source)
        assert all(parameter.is_meta for parameter in core.parameters()) and isinstance(tensors["embed.weight"], kind)
        out = tmp_path / f"out-{kind.__name__}"
        assert not export(source, out, "25KB")
        parts = sorted(out.glob("*.safetensors"))
        assert len(parts) > 1 and all(map(weights.has_checksum, parts))
        found = OpenMythos.from_pretrained(out)
        assert found.cfg == expected.cfg and found.cfg.rope_factor == 2
        assert all(found.state_dict()[name].equal(tensor) for name, tensor in expected.state_dict().items())
    ids = torch.randint(3, (2, 8))
    assert_near(AutoModelForCausalLM.from_pretrained(out, num_loops=2)(ids).logits, expected(ids, n_loops=2))
    assert (out / "training.json").read_bytes() == (run / "model" / "training.json").read_bytes()
    assert {"config.json", "generation_config.json", "modeling_open_mythos.py"} <= {path.name for path in out.iterdir()}


def test_a_mismatched_or_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    fit(tiny_run("steps=1"), tmp_path / "run", watch=Watch(log=lambda message: None))
    state = checkpoints.load(checkpoints.newest_first(tmp_path / "run" / "checkpoints")[0])
    state["trainer"]["ema"]["average"]["norm.weight"] = torch.ones(3)
    source = checkpoints.save(tmp_path, 1, state, 1)
    with pytest.raises(ValueError, match=r"step_00000001 does not match the model of its config: see its norm.weight"):
        export(source, tmp_path / "out")
    (source / "state.pt").unlink()
    with pytest.raises(ValueError, match=r"state.pt cannot be read \(No such file"):
        export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
