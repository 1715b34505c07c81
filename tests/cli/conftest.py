"""What all tests of commands share."""

import dataclasses
import functools
from collections.abc import Iterator

import pytest

from open_mythos.diagnostics import machine
from open_mythos.training import cost, gate, recipes
from open_mythos.training.config import EvalConfig, TrainConfig


@pytest.fixture(scope="package", autouse=True)
def quick() -> Iterator[None]:
    """Commands measure on little here: the demo on few problems at few depths, the machine by small products, a gate on
    few problems, and what a run costs by two steps."""
    whole = recipes.RECIPES["demo"]
    with pytest.MonkeyPatch.context() as patch:
        few = EvalConfig([24, 48, 96], [1, 4, 8], 8)

        @functools.wraps(whole)  # tests of recipes may come in between
        def demo() -> TrainConfig:
            return dataclasses.replace(whole(), evaluation=few)

        patch.setitem(recipes.RECIPES, "demo", demo)
        patch.setattr(machine, "MATMULS", ((64, 64, 64), (64, 64, 64)))
        patch.setattr(machine, "_READ_BYTES", {"cpu": 2**16})
        patch.setattr(gate, "_HELD_OUT", 16)
        patch.setattr(cost, "_TRIAL_STEPS", 2)
        yield
