"""The classes for transformers compute the same as the core model, and name what is wrong with their input."""

import pytest
import torch
import torch.nn.functional as F
from helpers import ATTENTION, assert_near, left_padding, tiny_config, tiny_model
from transformers import DynamicCache
from wrapped import prompts, wrapped

from open_mythos import OpenMythos
from open_mythos.integrations.hf import (
    OpenMythosConfig,
    OpenMythosForCausalLM,
    OpenMythosForSequenceClassification,
    OpenMythosModel,
)
from open_mythos.integrations.hf.base import CACHE

IDS = prompts(2, 8)


@pytest.mark.parametrize("halting", [True, False])
@pytest.mark.parametrize("attn_type", ATTENTION)
@torch.no_grad()
def test_logits_equal_those_of_the_core_model_at_any_number_of_loops(attn_type, halting):
    core = tiny_model(attn_type, halting=halting)
    lm = OpenMythosForCausalLM.wrap(core)
    for num_loops in (1, 4, 9):
        assert_near(lm(IDS, num_loops=num_loops).logits, core(IDS, num_loops))
    lm.config.num_loops = 6
    assert_near(lm(IDS).logits, core(IDS, 6))
    mask = left_padding([8, 3], 8)
    assert_near(lm(IDS, attention_mask=mask.long()).logits, core(IDS, 6, attention_mask=mask))
    lm.config.halting = not halting
    assert core.cfg.halting == halting
    assert_near(lm(IDS).logits, core(IDS, 6))
    assert core.cfg.halting != halting, "the core follows the config"


KINDS = {
    "untied head": dict(tied_head=False),
    "two dense blocks in the core": dict(core_layers=2, n_experts=0, input_norm=False, state_norm=False),
    "mixture": dict(recurrence="mixture", router_score="softmax", input_norm=False, state_norm=False, conv_taps=0,
                    local_window=0),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_kind_of_model_generates_saves_loads_and_resizes(kind, tmp_path):
    core = tiny_model("gqa", **KINDS[kind])
    lm = OpenMythosForCausalLM.wrap(core)
    assert lm.config.tie_word_embeddings == core.cfg.tied_head
    logits = lm(IDS, num_loops=3).logits
    assert_near(logits, core(IDS, 3))
    states = lm(IDS, num_loops=3, output_hidden_states=True).hidden_states
    assert len(states) == 4 and {tuple(state.shape) for state in states} == {(2, 8, 32)}
    cached = lm.generate(IDS, max_new_tokens=6, do_sample=False, num_loops=6)
    assert cached.equal(lm.generate(IDS, max_new_tokens=6, do_sample=False, num_loops=6, use_cache=False))
    lm.save_pretrained(tmp_path)
    assert_near(OpenMythosForCausalLM.from_pretrained(tmp_path)(IDS, num_loops=3).logits, logits)
    assert_near(OpenMythos.from_pretrained(tmp_path)(IDS, 3), logits)
    core.save_pretrained(tmp_path / "ours")
    assert_near(OpenMythosForCausalLM.from_pretrained(tmp_path / "ours")(IDS, num_loops=3).logits, logits)
    lm.resize_token_embeddings(30, mean_resizing=False)
    more = lm(IDS, num_loops=3).logits
    assert more.shape[-1] == 30 and (more[..., :23] - logits).abs().max() < 1e-5


def test_wrapping_shares_weights_and_keeps_the_mode():
    core = tiny_model()
    lm = OpenMythosForCausalLM.wrap(core)
    assert lm.core is core and not lm.training and not core.training
    assert lm.base_model.core is core and lm.model.core is core and not core.training
    assert lm.config.hidden_size == 32 and lm.config.num_attention_heads == 4 and lm.config.num_hidden_layers == 6


@torch.no_grad()
def test_hidden_states_are_one_per_loop():
    lm = wrapped(halting=False)
    seen = lm(IDS, output_hidden_states=True, num_loops=5).hidden_states
    assert len(seen) == 6 and len(wrapped()(IDS, output_hidden_states=True, num_loops=40).hidden_states) == 41
    model = OpenMythosModel(lm.config, lm.core)
    for num_loops in (1, 3, 5):
        shorter = model(IDS, output_hidden_states=True, num_loops=num_loops)
        assert_near(shorter.hidden_states[-1], seen[num_loops])
        assert_near(lm.core.head(shorter.last_hidden_state), lm(IDS, num_loops=num_loops).logits)


@torch.no_grad()
def test_standard_arguments_of_transformers_are_supported():
    lm = wrapped()
    logits = lm(IDS).logits
    assert_near(lm(inputs_embeds=lm.get_input_embeddings()(IDS)).logits, logits)
    assert_near(lm(IDS, position_ids=torch.arange(8)[None] + 5).logits, logits, 1e-4)  # rotary: only distances matter
    assert (lm(IDS, position_ids=torch.arange(8)[None] * 2).logits - logits).abs().max() > 1e-2
    assert_near(lm(IDS, logits_to_keep=3).logits, logits[:, -3:])
    assert_near(lm(IDS, logits_to_keep=torch.tensor([0, 5])).logits, logits[:, [0, 5]])
    assert_near(lm(IDS, labels=IDS).loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()))
    assert_near(lm(IDS, return_dict=False)[0], logits)
    assert CACHE in lm(IDS) and CACHE not in lm(IDS, use_cache=False)


@torch.no_grad()
def test_resizing_the_vocabulary_keeps_embedding_and_head_tied():
    lm = wrapped()
    before = lm(IDS).logits
    lm.resize_token_embeddings(30, mean_resizing=False)
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    assert lm(torch.full((1, 3), 29)).logits.shape == (1, 3, 30)
    assert_near(lm(IDS).logits[..., :23], before)


@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_a_classifier_reads_the_last_token_that_is_not_padding(padding):
    core = tiny_model()
    model = OpenMythosForSequenceClassification(OpenMythosConfig.from_mythos(core.cfg, num_labels=3), core).eval()
    mask = left_padding([8, 5], 8).long()
    ids = IDS * mask if padding == "left" else (IDS * mask).flip(1)
    mask = mask if padding == "left" else mask.flip(1)
    alone = torch.cat([model(row[keep.bool()][None]).logits for row, keep in zip(ids, mask, strict=True)])
    assert_near(model(ids, attention_mask=mask).logits, alone)
    model.config.pad_token_id = 0
    assert_near(model(ids).logits, alone)
    assert_near(model(ids, labels=torch.tensor([0, 2])).loss, F.cross_entropy(alone, torch.tensor([0, 2])))


def test_the_config_converts_to_mythos_config_and_refuses_unknown_fields():
    cfg = tiny_config()
    config = OpenMythosConfig.from_mythos(cfg, num_loops=7)
    assert config.mythos() == tiny_config(max_loop_iters=7) and config.num_loops == 7 and config.lora_loops == 4
    assert OpenMythosConfig(hidden_size=64, num_attention_heads=8).mythos().head_dim == 8
    with pytest.raises(ValueError, match="'n_head'; did you mean 'n_heads'"):
        OpenMythosConfig(n_head=3)
    with pytest.raises(ValueError, match="dim=33 is not divisible"):
        OpenMythosConfig(dim=33)


@pytest.mark.parametrize("head", ["language", "none", "classes"])
@torch.no_grad()
def test_arguments_without_effect_are_refused(head):
    lm = wrapped()
    of = {"language": lm, "none": lm.model, "classes": OpenMythosForSequenceClassification(lm.config, lm.core).eval()}
    model, at = of[head], torch.arange(8)[None]
    ends = torch.tensor([0, 8], dtype=torch.int32)
    sent = dict(cache_position=at[0], token_type_ids=0 * IDS, num_items_in_batch=8, return_dict=True, task_ids=None)
    packing = dict(position_ids=at, cu_seq_lens_q=ends, max_length_q=8, seq_idx=0 * at.int())
    found = model(IDS, **sent, **packing, output_router_logits=False)  # what Trainer, TRL and PEFT send to any model
    assert_near(found[0], model(IDS)[0], 1e-4)
    for given, instead in (
        (dict(n_loops=1), "n_loops here; use num_loops"),
        (dict(kv_cache={}), "kv_cache here; use cache"),
        (dict(start_pos=3), "start_pos here; use position_ids"),
        (dict(exit=None, num_loop=3), "num_loop here; leave it out"),
        (dict(output_router_logits=True), "output_router_logits here"),
        (dict(seq_idx=0 * IDS), "seq_idx here; use position_ids, which start again with each document"),
    ):
        with pytest.raises(ValueError, match=f"no argument {instead}"):
            model(IDS, **given)


PACKED = torch.cat([torch.arange(5), torch.arange(1), torch.arange(6)])[None]


@pytest.mark.parametrize("attn_type", ATTENTION)
@torch.no_grad()
def test_packed_documents_do_not_attend_to_each_other(attn_type):
    """Separated by position_ids that start again, with padding or without, or by numbers in attention_mask."""
    lm = wrapped(attn_type, halting=False)
    ids = prompts(2, 12)
    alone = torch.cat([lm(part, use_cache=False).logits for part in ids.split([5, 1, 6], 1)], 1)
    numbers = torch.tensor([[1] * 5 + [2] + [3] * 6]).expand(2, -1)
    for given in (
        dict(position_ids=PACKED), dict(position_ids=PACKED + 2), dict(position_ids=PACKED.expand(2, -1)),
        dict(position_ids=PACKED, attention_mask=torch.ones(2, 12)), dict(attention_mask=numbers),
    ):  # fmt: skip
        found = lm(ids, **given)
        assert CACHE not in found, "no cache was requested"
        assert_near(found.logits, alone, 1e-4)
        with pytest.raises(ValueError, match="a cache cannot hold several documents in one row; pass use_cache=False"):
            lm(ids, **given, use_cache=True)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 11] = 0
    found = lm(ids, position_ids=PACKED, attention_mask=mask).logits
    assert_near(found[0], alone[0], 1e-4)
    assert_near(found[1, :11], alone[1, :11], 1e-4)


@torch.no_grad()
def test_positions_of_padding_start_no_document():
    """Positions as generate() makes them, also without a cache."""
    lm, mask = wrapped(halting=False), left_padding([8, 3], 8).long()
    for at in ((mask.cumsum(1) - 1).clamp(min=0), (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)):
        found = lm(IDS, attention_mask=mask, position_ids=at, use_cache=False).logits
        assert_near(found[1, 5:], lm(IDS[1:, 5:]).logits[0], 1e-4)


@pytest.mark.parametrize("num_loops", [0, -1, 1.5, "8", True])
def test_invalid_loop_counts_are_refused(num_loops):
    with pytest.raises(ValueError, match="integer of at least 1"):
        wrapped()(IDS, num_loops=num_loops)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@torch.no_grad()
def test_a_cache_is_accepted_under_both_argument_names(name):  # cache from transformers 5.24 on
    lm, cache = wrapped(), DynamicCache()
    outputs = lm(IDS[:, :5], **{name: cache})
    assert outputs[CACHE] is cache
    assert_near(lm(IDS[:, 5:], **{name: outputs[CACHE]}).logits, lm(IDS).logits[:, 5:])
    head = OpenMythosForSequenceClassification(lm.config, lm.core).eval()
    for model in (lm.model, head):
        cache = DynamicCache()
        model(IDS[:, :5], **{name: cache})
        assert cache.get_seq_length() == 5, type(model).__name__


def test_more_loops_than_a_cache_holds_are_refused():
    lm, cache = wrapped(), DynamicCache()
    lm(IDS, past_key_values=cache, num_loops=2)
    with pytest.raises(ValueError, match="at most 2, or fill a new cache with 5"):
        lm(IDS[:, :1], past_key_values=cache, num_loops=5)


@pytest.mark.parametrize("given, message", [
    (dict(input_ids=IDS + 20), "holds 40, .*23 tokens.*the tokenizer is not this model's.*resize_token_embeddings"),
    (dict(), "either input_ids or inputs_embeds"),
    (dict(input_ids=IDS, past_key_values=((1, 2),)), "the cache is a tuple"),
    (dict(input_ids=IDS, past_key_values=DynamicCache(), cache=DynamicCache()), "two names of one argument"),
    (dict(input_ids=IDS, output_attentions=True), "attention weights are never computed"),
    (dict(inputs_embeds=torch.zeros(1, 3, 5)), r"embeddings have shape \(1, 3, 5\); use \(batch, tokens, 32\)"),
    (dict(input_ids=IDS, attention_mask=torch.ones(2, 5)), r"attention_mask has shape \(2, 5\)"),
    (dict(input_ids=IDS, attention_mask=[[1] * IDS.shape[1]] * 2), "attention_mask is a list"),
    (dict(input_ids=IDS.tolist()), "input_ids is a list; pass a tensor"),
    (dict(input_ids=IDS, position_ids=torch.arange(IDS.shape[1])), "position_ids has shape .*use "),
    (dict(input_ids=IDS, position_ids=torch.zeros(3, IDS.shape[1])), "position_ids has shape .*use "),
    (dict(input_ids=IDS, logits_to_keep=-1), "logits_to_keep=-1; use a number of last positions"),
    (dict(input_ids=IDS, logits_to_keep="1"), "logits_to_keep='1'; use a number of last positions"),
    (dict(input_ids=IDS, labels=IDS.float()), "labels are torch.float32; pass a tensor of token ids"),
    (dict(input_ids=IDS, labels=IDS - 99), "labels hold -.*; use token ids below 23, or -100 for no loss"),
    (dict(input_ids=IDS, labels=IDS + 23), "labels hold .*; use token ids below 23, or -100 for no loss"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_invalid_inputs_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        wrapped()(**given)
