"""The search for a layout, and the advice where none fits."""

from __future__ import annotations

import re
from typing import Any

import pytest
from helpers import tiny_config

from open_mythos import VARIANTS
from open_mythos.diagnostics import parameters
from open_mythos.planning.job import Degrees, Job, Settings
from open_mythos.planning.search import layouts, search, would_fit


def job(cfg: Any, gpus: int, memory: float = 80, **settings: Any) -> Job:
    return Job(cfg, gpus, Settings(**settings), memory * 1e9, n_parameters=parameters(cfg).total)


def test_layouts_divide_gpus_batch_and_experts() -> None:
    cfg = tiny_config(n_experts=4)
    found = layouts(job(cfg, 12, batch_size=24, length=8))
    assert len(found) == len(set(found)) > 50
    for layout in found:
        assert layout.gpus == 12 and layout.replicate * layout.shard * layout.rows * layout.accumulate == 24
        assert layout.expert * layout.slices * layout.copies == layout.replicate * layout.shard
        assert 4 % layout.expert == 0 and cfg.shared_dim % layout.tensor == 0
    fixed = layouts(job(cfg, 12, batch_size=24, length=8, parallel=Degrees(expert=2), checkpoint_loops="true"))
    assert {layout.expert for layout in fixed} == {2} and {layout.recompute for layout in fixed} == {True}


def test_search_finds_the_fastest_layout_that_fits() -> None:
    found = search(job(VARIANTS["mythos_1b"](), 8, length=512, batch_size=64))
    assert found.best is not None and found.sharded is not None
    assert found.best.memory.total <= found.best.job.room
    assert found.least.memory.total <= found.sharded.memory.total
    small = search(job(VARIANTS["mythos_1b"](), 8, 24, length=512, batch_size=64)).best
    assert small is not None and small.memory.total <= 24e9 * 0.92
    assert small.step_seconds >= found.best.step_seconds


def test_would_fit_suggests_parallelism_if_sharding_alone_is_not_enough() -> None:
    cfg = VARIANTS["mythos_1t"]()
    cfg.dense_dim = 21760  # divisible by the degrees, unlike 4/3 of dim
    asked = job(cfg, 1 << 15, length=1024, parallel=Degrees(expert=1, tensor=1))
    found = search(asked)
    assert found.best is None and found.sharded is found.least
    assert found.least.memory.gathered > 4 * 0.9 * parameters(cfg).total
    said = would_fit(asked)
    memory, degrees = re.match(r"--memory (\d+) (.*?) checkpoint_loops=true or ", said).groups()  # type: ignore[union-attr]
    values = {name: int(n) for name, n in re.findall(r"parallel\.(\w+)=(\d+)", degrees)}
    assert values["expert"] > 1 and values["tensor"] > 1
    fits = search(job(cfg, 1 << 15, int(memory), length=1024, parallel=Degrees(**values))).best
    assert fits is not None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(parallel=Degrees(shard=5)), "parallel.shard=5 does not divide --gpus 8; use a divisor of 8"),
        (dict(parallel=Degrees(expert=3)), "parallel.expert=3, but the model has 4 experts; use a divisor of 4"),
        (dict(parallel=Degrees(tensor=8)), "does not divide every feed-forward; use one of 1"),
        (dict(batch_size=4, parallel=Degrees(tensor=1)), "cannot be shared by 8 GPUs with rows of their own"),
        (dict(parallel=Degrees(replicate=4, shard=4)), "parallel.replicate=4 parallel.shard=4 does not fit --gpus 8"),
        (dict(length=10**6), "length=1000000 is more than model.max_seq_len"),
        (dict(loops=2, grad_loops=3), "grad_loops=3 is more than loops=2"),
    ],
)
def test_indivisible_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as error:
        search(job(tiny_config(n_experts=4), 8, **settings))
    assert said in str(error.value)
