"""Compiled blocks train like plain ones, and are not recompiled for other loop counts, problem lengths or steps."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny import tiny_run
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters

from open_mythos.training.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # raised in the compiler

FIXED = ("task.min_difficulty=6", "task.max_difficulty=6")
VARIED = ("task.min_difficulty=5", "task.max_difficulty=12")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with dynamo.patch(recompile_limit=dynamo.recompile_limit):
        yield
    torch._dynamo.reset()


def test_compiled_blocks_train_like_plain_ones() -> None:
    """Together with load-balanced experts, micro-batches, recomputed loops, weight averages and checkpoints."""
    overrides = *FIXED, "accumulate=2", "checkpoint_loops=true", "model.n_experts_per_tok=2"
    plain, compiled = Trainer(tiny_run(*overrides)), Trainer(tiny_run(*overrides, "compile=true"))
    for step in range(4):
        torch.manual_seed(step)
        expected = plain.step()
        torch.manual_seed(step)
        with torch.compiler.set_stance(force_backend="aot_eager"):
            found = compiled.step()
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    assert counters["stats"]["unique_graphs"] == 3
    assert plain.model.state_dict().keys() == compiled.model.state_dict().keys()
    moved = plain.model.recurrent.block.ffn.router_bias
    assert moved.any() and torch.equal(compiled.model.recurrent.block.ffn.router_bias, moved)
    torch.testing.assert_close(compiled.state_dict()["ema"], plain.state_dict()["ema"], rtol=1e-4, atol=1e-4)
    plain.load_state_dict(compiled.state_dict())
    with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):  # the averaged model is not compiled
        compiled.averaged()(torch.zeros(1, 5, dtype=torch.long), 2)


@pytest.mark.parametrize(
    ("overrides", "kinds"),
    [
        ((*VARIED, "model.prelude_layers=0", "model.coda_layers=0"), 2),
        ((*FIXED, "model.attn_type=mla", "model.core_layers=2", "precision=bf16", "loss.depth=uniform"), 3),
    ],
)
def test_other_loop_counts_and_lengths_cause_no_recompilation(overrides: tuple[str, ...], kinds: int) -> None:
    """Code is compiled for the core with and without gradient, and for prelude and coda; equal layers share it."""
    trainer = Trainer(tiny_run(*overrides, "compile=true", "loops.minimum=3"))
    loops = trainer.cfg.loops
    with torch.compiler.set_stance(force_backend="eager"):
        for _ in range(2):
            trainer.step()
        graphs = counters["stats"]["unique_graphs"]
        with dynamo.patch(error_on_recompile=True):
            for loops.minimum, loops.maximum in (3, 3), (7, 7), (2, 11):
                trainer.step()
    assert graphs == counters["stats"]["unique_graphs"] == kinds
    assert not counters["graph_break"]
