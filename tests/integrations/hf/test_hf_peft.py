"""PEFT adapters on attention and experts: untrained they change nothing; trained, loaded and merged they agree."""

import pytest
import torch
from helpers import assert_near
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM
from wrapped import greedy, prompts, wrapped

from open_mythos import OpenMythos

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
IDS = prompts(2, 8)
ADAPTERS = {
    "attention": dict(target_modules=["wq", "wk", "wv", "wo", "q_down", "q_up", "kv_down", "kv_up"]),
    "experts": dict(target_modules=["wo"], target_parameters=["ffn.gate_up", "ffn.down"]),
    "dora": dict(target_modules=["wo"], use_dora=True),
    "every matrix": dict(target_modules="all-linear"),
}


@pytest.mark.parametrize("attn_type, adapter", [(a, n) for n in ADAPTERS for a in ("gqa", "mla")])
def test_adapters_train_save_load_and_merge(tmp_path, attn_type, adapter):
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
    assert all(parameter.grad.abs().max() > 0 for parameter in trained), "every adapter has gradients"
    model.eval()
    after = model(IDS, num_loops=3).logits.detach()
    assert (after - before).abs().max() > 0.1
    assert torch.equal(greedy(model, IDS, num_loops=3), greedy(model, IDS, num_loops=3, use_cache=False))
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert_near(PeftModel.from_pretrained(base, tmp_path / "adapter")(IDS, num_loops=3).logits, after, 1e-4)
    if adapter != "dora":  # transformers, unlike PEFT, loses a part of it, for any model
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")  # its config names the base
        assert_near(loaded(IDS, num_loops=3).logits, after, 1e-4)
    merged = model.merge_and_unload()
    assert type(merged) is type(lm)
    assert_near(merged(IDS, num_loops=3).logits, after, 1e-4)
    assert_near(merged.core(IDS, 3), after, 1e-4)


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")  # generate() passes them
@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig])
def test_prompts_can_be_tuned(tmp_path, kind):
    model = get_peft_model(wrapped(), kind(task_type="CAUSAL_LM", num_virtual_tokens=3)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model(IDS, labels=IDS, num_loops=2).loss.backward()
    assert trained and all(parameter.grad.abs().max() > 0 for parameter in trained)
    logits = model.eval()(IDS).logits
    assert torch.equal(greedy(model, IDS)[:, IDS.shape[1]], logits[:, -1].argmax(-1))
    model.save_pretrained(tmp_path)
    assert_near(PeftModel.from_pretrained(wrapped(), tmp_path).eval()(IDS).logits, logits)


def test_prefix_tuning_is_refused():
    """A prefix would be key/value rows of each loop."""
    model = get_peft_model(wrapped(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="the cache was filled by another model or by prefix tuning; pass a new cache"):
        model(IDS)


PLAIN = dict(n_experts=0, lora_rank=0)  # training changes parameters only


def trained(**options):
    model = get_peft_model(
        wrapped(**PLAIN), LoraConfig(task_type="CAUSAL_LM", target_modules=["wq"], **options)
    ).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings:UserWarning")
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning")
@torch.no_grad()
def test_a_head_trained_apart_from_the_embedding_stays_untied(tmp_path):
    with torch.enable_grad():
        merged = trained(modules_to_save=["head"]).merge_and_unload()
    right = merged(IDS).logits
    merged.core.save_pretrained(tmp_path / "ours")
    merged.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        for model in (AutoModelForCausalLM.from_pretrained(folder), OpenMythos.from_pretrained(folder)):
            cfg = model.cfg if isinstance(model, OpenMythos) else model.core.cfg
            assert not cfg.tied_head
            found = model.to("cpu").float()(IDS)
            assert_near(found if isinstance(model, OpenMythos) else found.logits, right, 1e-4)


def test_an_embedding_and_head_trained_tied_stay_tied(tmp_path):
    model = trained(modules_to_save=["embed", "head"], ensure_weight_tying=True)
    before = model(IDS).logits.detach()
    model.save_pretrained(tmp_path / "adapter")
    base = wrapped(**PLAIN)
    assert_near(PeftModel.from_pretrained(base, tmp_path / "adapter")(IDS).logits, before, 1e-4)
    merged = model.merge_and_unload()
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    merged.save_pretrained(tmp_path / "merged")
    assert OpenMythos.from_pretrained(tmp_path / "merged").cfg.tied_head
    assert_near(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits, before, 1e-4)


def test_replacing_the_head_unties_it_from_the_embedding(tmp_path):
    lm = wrapped()
    head = torch.nn.Linear(32, 23, bias=False)
    lm.set_output_embeddings(head)
    assert lm.get_output_embeddings() is head and not lm.config.tie_word_embeddings
    lm.save_pretrained(tmp_path)
    assert_near(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, lm(IDS).logits, 1e-4)
