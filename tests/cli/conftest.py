"""Settings for all tests of commands."""

import dataclasses
import functools
from collections.abc import Iterator

import pytest

from open_mythos.diagnostics import machine
from open_mythos.training import cost, gate, recipes
from open_mythos.training.config import EvalConfig, TrainConfig


@pytest.fixture(scope="package", autouse=True)
def quick() -> Iterator[None]:
    """Keep measurements in commands small: few problems and depths for the demo, small matrices for the speed of the
    machine, few problems for a gate, and two steps to estimate the cost of a run."""
    whole = recipes.RECIPES["demo"]
    with pytest.MonkeyPatch.context() as patch:
        few = EvalConfig([24, 48, 96], [1, 4, 8], 8)

        @functools.wraps(whole)  # tests of recipes may run while this is patched
        def demo() -> TrainConfig:
            return dataclasses.replace(whole(), evaluation=few)

        patch.setitem(recipes.RECIPES, "demo", demo)
        patch.setattr(machine, "MATMULS", ((64, 64, 64), (64, 64, 64)))
        patch.setattr(machine, "_READ_BYTES", {"cpu": 2**16})
        patch.setattr(gate, "_HELD_OUT", 16)
        patch.setattr(cost, "_TRIAL_STEPS", 2)
        yield
