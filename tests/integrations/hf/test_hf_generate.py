"""generate() of transformers gives the same tokens with a cache of any kind as without one."""

import copy

import pytest
import torch
from helpers import ATTENTION, assert_near, left_padding
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
    pipeline,
)
from transformers.generation import BaseStreamer
from wrapped import greedy, letters, prompts, wrapped

from open_mythos.integrations.hf.base import CACHE

IDS = prompts(3, 8)
MASK = left_padding([8, 3, 5], 8).long()
PADDED = dict(ids=IDS * MASK, attention_mask=MASK)
MODELS = [(attn_type, halting) for attn_type in ATTENTION for halting in (True, False)]
WAYS = {
    "greedy": {},
    "sampling": dict(do_sample=True, top_k=5),
    "beams": dict(num_beams=3, num_return_sequences=2),
    "several": dict(do_sample=True, num_return_sequences=2),
}


@pytest.fixture(scope="module", params=MODELS, ids=str)
def lm(request):
    attn_type, halting = request.param
    return wrapped(attn_type, halting=halting)


@pytest.mark.parametrize("num_loops", [2, 7])
@pytest.mark.parametrize("way", WAYS)
def test_a_cache_does_not_change_the_tokens(lm, way, num_loops):
    torch.manual_seed(0)
    cached = greedy(lm, **PADDED, num_loops=num_loops, **WAYS[way])
    torch.manual_seed(0)
    assert torch.equal(cached, greedy(lm, **PADDED, num_loops=num_loops, use_cache=False, **WAYS[way]))


def test_left_padded_rows_generate_the_tokens_of_the_core_model(lm):
    together = greedy(lm, **PADDED, num_loops=7)
    for row, length in enumerate((8, 3, 5)):
        alone = lm.core.generate(IDS[row : row + 1, -length:], 6, n_loops=7, temperature=0)
        assert torch.equal(alone[0, length:], together[row, 8:])


@pytest.mark.parametrize("kind", ["default", "dynamic", "with config", "static"])
def test_every_cache_class_gives_the_same_tokens(lm, kind):
    expected = greedy(lm, **PADDED, num_loops=7, use_cache=False)
    caches = {
        "default": dict(cache_implementation="static"),
        "dynamic": {CACHE: DynamicCache()},
        "with config": {CACHE: DynamicCache(config=lm.config)},
        "static": {CACHE: StaticCache(config=lm.config, max_cache_len=16)},
    }
    assert torch.equal(greedy(lm, **PADDED, num_loops=7, **caches[kind]), expected)


def test_a_streamer_receives_the_same_tokens_one_by_one(lm):
    class Collected(BaseStreamer):
        def __init__(self):
            self.pieces = []

        def put(self, value):
            self.pieces.append(value.flatten().tolist())

        def end(self):
            self.pieces.append([])

    streamer = Collected()
    expected = greedy(lm, IDS[:1], num_loops=7)
    assert torch.equal(greedy(lm, IDS[:1], num_loops=7, streamer=streamer), expected)
    prompt, *new, last = streamer.pieces
    assert prompt == IDS[0].tolist() and last == [] and [len(piece) for piece in new] == [1] * 6
    assert [token for piece in new for token in piece] == expected[0, 8:].tolist()


@torch.no_grad()
def test_chunked_prefill_and_a_cropped_copied_cache_give_the_same_logits(lm):
    ids, whole = PADDED["ids"], lm(PADDED["ids"], attention_mask=MASK, num_loops=6, use_cache=False).logits
    cache, found = DynamicCache(), []
    for part in (slice(0, 3), slice(3, 7)):
        found.append(lm(ids[:, part], attention_mask=MASK[:, : part.stop], past_key_values=cache, num_loops=6).logits)
    cache.crop(-2)
    assert cache.get_seq_length() == 5
    again = lm(ids[:, 5:], attention_mask=MASK, past_key_values=copy.deepcopy(cache), num_loops=6).logits
    real = MASK.bool().unsqueeze(-1)
    assert_near(torch.cat([*found, again[:, 2:]], 1) * real, whole * real)
    assert_near(again * real[:, 5:], whole[:, 5:] * real[:, 5:])


@pytest.mark.parametrize("num_loops", [2, 7])
def test_assisted_decoding_gives_the_same_tokens(lm, num_loops):
    expected = greedy(lm, IDS[:1], num_loops=num_loops, use_cache=False)
    for helper in (dict(assistant_model=wrapped(seed=1)), dict(prompt_lookup_num_tokens=3)):
        assert torch.equal(greedy(lm, IDS[:1], num_loops=num_loops, **helper), expected)


def test_an_assistant_runs_the_loops_of_its_own_config(monkeypatch):
    lm, helper, loops = wrapped(), wrapped(seed=1), []
    states, helper.config.num_loops = helper.core.states, 2
    monkeypatch.setattr(
        helper.core, "states", lambda ids, n, *rest, **more: loops.append(n) or states(ids, n, *rest, **more)
    )
    sizes = dict(vocab_size=23, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)
    expected = greedy(lm, IDS[:1], num_loops=7, use_cache=False)
    for assistant in (helper, LlamaForCausalLM(LlamaConfig(**sizes))):
        assert torch.equal(greedy(lm, IDS[:1], num_loops=7, assistant_model=assistant), expected)
        lm.generation_config.num_loops = 7
        assert torch.equal(greedy(lm, IDS[:1], assistant_model=assistant), expected)
        del lm.generation_config.num_loops
    assert set(loops) == {2}


def test_num_loops_can_be_set_in_a_generation_config(tmp_path):
    lm = wrapped(halting=False)
    config = GenerationConfig(max_new_tokens=6, do_sample=False, num_loops=7)
    found = lm.generate(IDS, attention_mask=torch.ones_like(IDS), generation_config=config)
    assert torch.equal(found, greedy(lm, IDS, num_loops=7))
    assert not torch.equal(found, greedy(lm, IDS, num_loops=1))
    lm.core.save_pretrained(tmp_path / "first")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    lm.generation_config.num_loops = 1
    lm.save_pretrained(tmp_path / "shallow")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "shallow")
    assert torch.equal(greedy(lm, IDS), greedy(lm, IDS, num_loops=1))


def test_generation_streams_takes_embeddings_and_returns_hidden_states():
    class Collected(list):
        put, end = list.append, lambda self: None

    lm, got = wrapped(), Collected()
    found = greedy(lm, IDS[:1], streamer=got, num_loops=6)
    assert torch.equal(torch.cat([new.flatten() for new in got]), found[0])
    embedded = lm.get_input_embeddings()(IDS[:1])
    assert torch.equal(greedy(lm, None, attention_mask=MASK[:1], inputs_embeds=embedded, num_loops=6), found[:, 8:])
    every = greedy(lm, IDS, num_loops=5, output_hidden_states=True, return_dict_in_generate=True)
    assert len(every.hidden_states) == 6 and len(every.hidden_states[0]) == 6


def test_an_unknown_argument_is_refused():
    with pytest.raises(ValueError, match="n_loops"):
        greedy(wrapped(), IDS, n_loops=3)


def test_a_pipeline_generates_and_refuses_the_tokenizer_of_another_model():
    lm = wrapped()
    write = pipeline("text-generation", model=lm, tokenizer=letters())
    texts = write(["abc", "a"], max_new_tokens=5, do_sample=False, num_loops=7, batch_size=2)
    assert [text[0]["generated_text"].startswith(start) for text, start in zip(texts, ("abc", "a"), strict=True)]
    with pytest.raises(ValueError, match="the tokenizer is not this model's"):
        pipeline("text-generation", model=lm, tokenizer=letters(28))("xyz", max_new_tokens=2)


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_a_text_may_be_one_token_longer_than_max_seq_len(attn_type, n):
    """The last generated token is never processed, in any of the ways in which transformers decodes."""
    lm, larger, ids = wrapped(attn_type, max_seq_len=12), wrapped(attn_type, max_seq_len=64), prompts(1, 13 - n)
    expected = greedy(larger, ids, n, num_loops=4)
    ways = {
        "default": {}, "no cache": dict(use_cache=False), "static": dict(cache_implementation="static"),
        "assistant": dict(assistant_model=wrapped(seed=1, max_seq_len=12)), "lookup": dict(prompt_lookup_num_tokens=3),
    }  # fmt: skip
    for way, options in ways.items():
        assert torch.equal(greedy(lm, ids, n, num_loops=4, **options), expected), way
        with pytest.raises(ValueError, match=r"max_seq_len=12; .* raise max_seq_len in the model's config"):
            greedy(lm, ids, n + 1, num_loops=4, **options)
    beams = dict(num_loops=4, num_beams=3)
    assert torch.equal(greedy(lm, ids, n, **beams), greedy(larger, ids, n, **beams))
