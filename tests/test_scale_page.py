"""docs/scale.md: its rows match the output of ``mythos plan``."""

from __future__ import annotations

import os

import plans
import pytest


def test_every_variant_is_on_the_page() -> None:
    from open_mythos import VARIANTS

    assert {f"mythos_{variant}" for variant, *_ in plans.PLANNED} == set(VARIANTS)


@pytest.mark.parametrize("one", plans.PLANNED if os.environ.get("PLAN_CHECK") == "all" else plans.PLANNED[-3:-2])
def test_rows_match_the_plans(one: tuple[str, int, int, str]) -> None:
    assert f"| {' | '.join(plans.line(*one))} |" in plans.PAGE.read_text()
