"""On a GPU: fast paths match the reference, training in bfloat16 lowers the loss, generation matches the CPU."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import ATTENTION, assert_near, gradients, left_padding, tiny_model, tokens
from training.tiny import tiny_run

from open_mythos import KVCache
from open_mythos.generation.engine import Depth
from open_mythos.generation.engines import make_engine
from open_mythos.reference import reference_logits
from open_mythos.training.overrides import override
from open_mythos.training.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
CLOSE = 2e-4  # float32 sums in another order


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    for module in ("generation.engine", "training.trainer"):
        monkeypatch.setattr(f"open_mythos.{module}.use_tf32", lambda device: None)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("halting", [False, True])
def test_logits_match_the_reference(attn_type, halting):
    model, ids = tiny_model(attn_type, halting=halting).cuda(), tokens(3, 9).cuda()
    mask = left_padding([9, 5, 1], 9).cuda()
    with torch.no_grad():
        expected = reference_logits(model, ids, 5, mask)
        found = model(ids, 5, attention_mask=mask)
    assert_near(found[mask], expected[mask], CLOSE)


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_gradients_match_the_reference(attn_type):
    model, ids = tiny_model(attn_type, halting=False).train().cuda(), tokens(2, 9).cuda()
    expected = gradients(model, reference_logits(model, ids, 3).square().sum())
    found = gradients(model, model(ids, 3).square().sum())
    for name, gradient in found.items():
        assert_near(gradient, expected[name], 10 * CLOSE, name)


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_cached_logits_equal_uncached_logits(attn_type):
    model, ids, cache = tiny_model(attn_type, halting=False).cuda(), tokens(2, 12).cuda(), KVCache()
    with torch.inference_mode():
        whole = model(ids, 4)
        found = [model(part, 4, cache) for part in ids.split([7, 1, 1, 3], 1)]
    assert_near(torch.cat(found, 1), whole, CLOSE)


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_generated_tokens_match_the_cpu(attn_type):
    model, ids = tiny_model(attn_type), tokens(2, 5)
    expected = model.generate(ids, 8, n_loops=4, temperature=0)
    assert torch.equal(copy.deepcopy(model).cuda().generate(ids.cuda(), 8, n_loops=4, temperature=0).cpu(), expected)


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("default")  # of torch.compile
def test_training_in_bfloat16_lowers_the_loss(attn_type, compiled):
    model, ids = tiny_model(attn_type, halting=False).train().cuda(), tokens(8, 17).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    if compiled:
        for block in (*model.prelude, model.recurrent.block, *model.coda):
            block.compile()
    losses = []
    for _ in range(30):
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(ids[:, :-1], 3).flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("padded", [False, True])
def test_cuda_graph_logits_match_the_model_through_growth_and_truncation(attn_type, padded):
    model, ids = tiny_model(attn_type, halting=False, max_seq_len=128).cuda(), tokens(3, 60).cuda()
    mask = left_padding([6, 3, 1] if padded else [6] * 3, 6).cuda()
    with torch.no_grad():
        whole = model(ids, 4, attention_mask=F.pad(mask, (0, 54), value=True))
    engine = make_engine("graph", model, Depth(4), room=16)
    assert_near(engine.extend(ids[:, :6], mask), whole[:, 5], CLOSE)
    for i in [*range(6, 30), *range(25, 60)]:
        engine.truncate(min(i, engine.cache.length))
        assert_near(engine.step(ids[:, i : i + 1]), whole[:, i], CLOSE)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_step_synchronises_with_the_gpu_once(accumulate, precision):
    """Without experts, unless in bfloat16 on recent GPUs: elsewhere their grouped products synchronise too."""
    cfg = tiny_run(f"accumulate={accumulate}", f"precision={precision}", "device=cuda")
    if precision == "fp32" or torch.cuda.get_device_capability()[0] < 9:
        cfg = override(cfg, ["model.n_experts=0", "model.n_shared_experts=0"])
    trainer = Trainer(cfg)
    trainer.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing" in str(warning.message) for warning in caught) == 1


def test_text_batches_are_in_pinned_memory(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"run for {i} loops\n" * 9)
    trainer = Trainer(tiny_run(
        "task.name=text", f"task.options.source={tmp_path}", "task.options.separate=true", "task.min_difficulty=8",
        "task.max_difficulty=8", "evaluation.difficulties=8", "model.vocab_size=257", "device=cuda",
    ))  # fmt: skip
    batch = trainer.draw()[0].batch
    assert batch.ids.is_pinned() and batch.targets.is_pinned() and trainer.step().loss > 0
