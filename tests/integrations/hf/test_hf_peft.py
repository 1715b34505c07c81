"""PEFT's adapters around attention and experts: nothing at first, trained, loaded and merged without a difference."""

import pytest
import torch
from helpers import assert_near
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from wrapped import greedy, prompts, wrapped

IDS = prompts(2, 8)
ADAPTERS = {
    "attention": dict(target_modules=["wq", "wk", "wv", "wo", "q_down", "q_up", "kv_down", "kv_up"]),
    "experts": dict(target_modules=["wo"], target_parameters=["ffn.gate_up", "ffn.down"]),
    "dora": dict(target_modules=["wo"], use_dora=True),
    "every matrix": dict(target_modules="all-linear"),
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("attn_type, adapter", [(a, n) for n in ADAPTERS for a in ("gqa", "mla")])
def test_adapters(tmp_path, attn_type, adapter):
    wrapped(attn_type).save_pretrained(tmp_path / "base")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = lm(IDS).logits.detach()
    model = get_peft_model(lm, LoraConfig(r=4, task_type="CAUSAL_LM", **ADAPTERS[adapter]))
    assert_near(model(IDS).logits, before)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, 1e-2)
    model.train()
    for _ in range(3):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(parameter.grad.abs().max() > 0 for parameter in trained), "every adapter has learnt something"
    model.eval()
    after = model(IDS, num_loops=3).logits.detach()
    assert (after - before).abs().max() > 0.1
    assert torch.equal(greedy(model, IDS, num_loops=3), greedy(model, IDS, num_loops=3, use_cache=False))
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert_near(PeftModel.from_pretrained(base, tmp_path / "adapter")(IDS, num_loops=3).logits, after, 1e-4)
    if adapter != "dora":  # of which transformers, but not PEFT, loses a part, whatever the model
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")  # its config names the base
        assert_near(loaded(IDS, num_loops=3).logits, after, 1e-4)
    merged = model.merge_and_unload()
    assert type(merged) is type(lm)
    assert_near(merged(IDS, num_loops=3).logits, after, 1e-4)
    assert_near(merged.core(IDS, 3), after, 1e-4)
