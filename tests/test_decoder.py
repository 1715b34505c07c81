"""The decoder of few operations is the model's modules, for every kind of model and any split into steps."""

import pytest
import torch
from helpers import assert_near

from open_mythos import KVCache, MythosConfig, OpenMythos
from open_mythos.generation.decoder import Decoder, ModuleDecoder, is_plain, make_decoder, together
from open_mythos.nn.exits import StateChange

KINDS = {
    "gqa": dict(attn_type="gqa"),
    "mla": dict(attn_type="mla"),
    "gqa, no convolution, one expert": dict(attn_type="gqa", conv_taps=0, n_experts=1, n_experts_per_tok=1),
    "mla, all heads far, no shared expert": dict(attn_type="mla", local_window=0, n_shared_experts=0),
    "all heads local": dict(attn_type="gqa", local_share=1.0, n_shared_experts=0),
    "loop index and lora": dict(attn_type="mla", loop_index_dim=6, lora_rank=3, conv_taps=2),
    "stretched rotary": dict(attn_type="gqa", rope_factor=4.0, rope_context=20, rope_theta=100.0),
    "no input norm": dict(attn_type="mla", input_norm=False),
    "three dense blocks in the core": dict(
        attn_type="gqa", core_layers=3, n_experts=0, dense_dim=19, tied_head=False, norm_eps=1e-3
    ),
    "zero start, no state norm": dict(attn_type="gqa", state_init="zero", state_norm=False, prelude_layers=0),
}


def a_model(**changes) -> OpenMythos:
    torch.manual_seed(0)
    cfg = dict(
        vocab_size=40, dim=32, n_heads=4, n_kv_heads=2, max_seq_len=256, max_loop_iters=5, prelude_layers=1,
        coda_layers=2, kv_lora_rank=12, q_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6,
        n_experts=5, n_shared_experts=1, n_experts_per_tok=2, expert_dim=8, lora_rank=0, local_window=4, halting=False,
    )  # fmt: skip
    model = OpenMythos(MythosConfig(**cfg | changes)).eval()
    with torch.no_grad():
        for weight in model.parameters():  # norms and adapters start as identities, which would hide mistakes
            weight.add_(0.5 * weight.abs().mean().clamp(min=0.02) * torch.randn_like(weight))
    return model


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_steps_of_any_length_are_the_modules(kind):
    model, ids = a_model(**KINDS[kind]), torch.randint(0, 40, (3, 60))
    caches = KVCache(), KVCache()
    for cache in caches:
        model(ids[:, :4], 5, cache)
    decoders = Decoder(model, 5), ModuleDecoder(model)
    start = 4
    for n in (1, 1, 3, 40, 1, 2, 1):
        logits = []
        for decoder, cache in zip(decoders, caches, strict=True):
            e, tokens = decoder.encode(ids[:, start : start + n], cache)
            h = decoder.loops(decoder.first_state(e), e, tokens, 0, 2)
            logits.append(decoder.decode(decoder.loops(h, e, tokens, 2, 5), tokens))
        assert_near(*logits)
        start += n


@torch.no_grad()
def test_tokens_encoded_one_by_one_go_on_together():
    model, ids = a_model(attn_type="gqa"), torch.randint(0, 40, (2, 9))
    whole, cache = model(ids, 5), KVCache()
    decoder = Decoder(model, 5)
    model(ids[:, :6], 5, cache)
    parts = []
    for i in range(6, 9):
        e, tokens = decoder.encode(ids[:, i : i + 1], cache)
        parts.append((decoder.loops(decoder.first_state(e), e, tokens, 0, 3), e, tokens))
    h, e, seen = zip(*parts, strict=True)
    tokens = together(seen)
    assert_near(decoder.decode(decoder.loops(torch.cat(h, 1), torch.cat(e, 1), tokens, 3, 5), tokens), whole[:, 6:])


def test_generation_uses_it_and_gives_the_modules_tokens(monkeypatch):
    model, prompt = a_model(attn_type="gqa"), torch.randint(0, 40, (2, 7))
    assert type(make_decoder(model, 5, padded=False)) is Decoder
    fast = model.generate(prompt, 30, temperature=0)
    monkeypatch.setattr("open_mythos.generation.generate.make_decoder", lambda model, *_, **__: ModuleDecoder(model))
    assert model.generate(prompt, 30, temperature=0).equal(fast)


@pytest.mark.parametrize("cache_loops", [None, 2])
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_a_token_alone_stops_where_the_modules_stop_it(attn_type, cache_loops, monkeypatch):
    model, prompt = a_model(attn_type=attn_type), torch.randint(0, 40, (1, 7))
    exit, loops = StateChange(0.4), []
    options = dict(temperature=0, exit=exit, cache_loops=cache_loops)
    until = Decoder.loops_until

    def watched(self, *args):
        step = self.core[0]
        self.core[0] = lambda *a: loops.append(1) or step(*a)
        try:
            return until(self, *args)
        finally:
            self.core[0] = step

    monkeypatch.setattr(Decoder, "loops_until", watched)
    fast = model.generate(prompt, 30, **options)
    assert 29 < len(loops) < 29 * 5, "some tokens stop early, and not all at once"
    monkeypatch.setattr("open_mythos.generation.generate.make_decoder", lambda model, *_, **__: ModuleDecoder(model))
    assert model.generate(prompt, 30, **options).equal(fast)


def test_what_others_put_into_a_model_takes_part():
    """Hooks, replaced layers and overridden methods are for the modules, so these decode then."""
    model = a_model(attn_type="gqa")
    assert is_plain(model)
    handle, seen = model.recurrent.block.attn.register_forward_hook(lambda *_: seen.append(1)), []
    assert not is_plain(model)
    model.generate(torch.zeros(1, 3, dtype=torch.long), 4)
    assert len(seen) == 4 * 5
    handle.remove()
    assert is_plain(model)
    model.coda[0].attn.wq = torch.nn.Sequential(model.coda[0].attn.wq)
    assert not is_plain(model)


def test_padded_rows_are_left_to_the_modules():
    assert type(make_decoder(a_model(), 5, padded=True)) is ModuleDecoder
