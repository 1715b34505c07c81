"""What all tests of commands share."""

import dataclasses
import functools
from collections.abc import Iterator

import pytest

from open_mythos.training import recipes
from open_mythos.training.config import EvalConfig, TrainConfig


@pytest.fixture(scope="package", autouse=True)
def quick_demo() -> Iterator[None]:
    """``mythos demo`` evaluates few problems at few depths here: that takes longer than a short training."""
    whole = recipes.RECIPES["demo"]
    with pytest.MonkeyPatch.context() as patch:
        quick = EvalConfig([24, 48, 96], [1, 4, 8], 8)

        @functools.wraps(whole)  # tests of recipes may come in between
        def demo() -> TrainConfig:
            return dataclasses.replace(whole(), evaluation=quick)

        patch.setitem(recipes.RECIPES, "demo", demo)
        yield
