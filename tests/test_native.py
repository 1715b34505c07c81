"""Compiled decoding gives what the modules give, from the same cache, and refuses what it cannot do."""

import copy

import pytest
import torch
from helpers import assert_near, left_padding
from test_decoder import KINDS, a_model

from open_mythos import KVCache
from open_mythos import native as build
from open_mythos.generation.native import code
from open_mythos.generation.native.decoder import CompiledDecoder
from open_mythos.nn.exits import Gate, StableArgmax
from open_mythos.nn.halting import ACTHalting
from open_mythos.nn.moe import MoEFFN

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C compiler: install gcc or clang, or set $CC")
ODD = dict(
    dim=36, n_heads=6, n_kv_heads=3, vocab_size=37, expert_dim=7, kv_lora_rank=11, q_lora_rank=13, v_head_dim=5,
    qk_nope_head_dim=9, qk_rope_head_dim=6, n_experts=3, conv_taps=4, local_window=5,
)  # fmt: skip
SHAPES = KINDS | {
    "gqa, odd sizes": dict(attn_type="gqa", **ODD),
    "mla, odd sizes": dict(attn_type="mla", **ODD),
    "gqa, one key head, wide window": dict(attn_type="gqa", n_kv_heads=1, local_window=50),
    "mla, no convolution, no coda": dict(attn_type="mla", conv_taps=0, coda_layers=0, state_init="noise"),
}
PLAIN = dict(attn_type="gqa")


class Own(ACTHalting):
    """Somebody's own gate."""


def ids(*shape, high=37):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(1))


@needs_compiler
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("n_threads", [1, 3])
@torch.no_grad()
def test_every_token_has_the_logits_of_one_pass(kind, n_threads, threads):
    threads(n_threads)
    model, text, cache = a_model(**SHAPES[kind]), ids(2, 110), KVCache()
    for layer in model.recurrent.layers:
        if isinstance(layer.ffn, MoEFFN):
            layer.ffn.router_bias.normal_()
    if model.recurrent.lora is not None:
        model.recurrent.lora.trained_loops.fill_(3)
    whole = model(text, 5)
    model(text[:, :2], 5, cache)  # shorter than a window, and than a convolution of four taps
    decoder = CompiledDecoder(model, 5)
    found = [decoder.step(text[:, i : i + 1], cache)[1] for i in range(2, 110)]
    assert_near(torch.stack(found, 1), whole[:, 2:], what=kind)
    assert set(cache.lengths().values()) == {110}


@needs_compiler
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
@torch.no_grad()
def test_it_takes_turns_with_the_modules_on_one_cache(attn_type):
    model, text, cache = a_model(attn_type=attn_type), ids(2, 60), KVCache()
    whole, decoder, at = model(text, 5), CompiledDecoder(model, 5), 4
    model(text[:, :at], 5, cache)
    for n, cut in ((1, 0), (1, 1), (20, 0), (1, 0), (1, 15), (30, 0), (1, 0)):
        new = text[:, at : at + n]
        logits = decoder.step(new, cache)[1] if n == 1 else model(new, 5, cache)[:, -1]
        assert_near(logits, whole[:, at + n - 1])
        at += n - cut
        cache.truncate(at)


@needs_compiler
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
@pytest.mark.parametrize("n_threads", [1, 3])
@torch.no_grad()
def test_rows_are_padded_on_the_left(attn_type, n_threads, threads):
    threads(n_threads)
    model, text, cache = a_model(attn_type=attn_type), ids(4, 60), KVCache()
    whole = model(text, 5, attention_mask=left_padding([60, 41, 57, 40], 60))
    model(text[:, :20], 5, cache, attention_mask=left_padding([20, 1, 17, 0], 20))
    decoder = CompiledDecoder(model, 5)
    for i in range(20, 60):
        new = text[:, i : i + 1]
        logits = model(new, 5, cache)[:, -1] if i % 10 == 9 else decoder.step(new, cache)[1]
        assert_near(logits, whole[:, i], what=f"token {i}")


@needs_compiler
@torch.no_grad()
def test_a_copy_of_a_cache_goes_on_by_itself():
    model, text, cache = a_model(**PLAIN), ids(2, 9), KVCache(room=40)
    whole, decoder = model(text, 5), CompiledDecoder(model, 5)
    model(text[:, :6], 5, cache)
    decoder.step(text[:, 6:7], cache)
    copied = copy.deepcopy(cache)
    decoder.step(text[:, 7:8], cache)
    decoder.step(text[:, :1], copied)
    assert_near(decoder.step(text[:, 8:], cache)[1], whole[:, 8])


@needs_compiler
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
@pytest.mark.parametrize(
    "options", [{}, dict(cache_loops=2), dict(warm_start=True), dict(attention_mask=left_padding([4, 7], 7))], ids=str
)
def test_generation_gives_the_same_tokens(attn_type, options):
    model = a_model(attn_type=attn_type, state_init="noise").train()
    expected = model.generate(ids(2, 7), 40, temperature=0, **options)
    assert model.generate(ids(2, 7), 40, temperature=0, compile=True, **options).equal(expected)
    assert model.training
    drawn = [model.generate(ids(2, 7), 20, compile=on, generator=torch.Generator().manual_seed(3)) for on in (0, 1)]
    assert drawn[0].equal(drawn[1])


@needs_compiler
def test_two_texts_at_a_time_and_a_pause_between_tokens(threads):
    threads(2)
    model = a_model(**PLAIN)
    expected = model.generate(ids(1, 7), 12, temperature=0)[0, 7:].tolist()
    texts = [model.stream(ids(1, 7), 12, temperature=0, compile=True) for _ in range(2)]
    found = []
    for tokens in zip(*texts, strict=True):
        found.append([int(token) for token in tokens])
        if len(found) == 6:
            torch.empty(1).new_ones(3_000_000).sort()  # longer than workers stay awake
    assert found == [[token, token] for token in expected]


@needs_compiler
@pytest.mark.parametrize(
    "change, options, words",
    [
        (lambda model: model.bfloat16(), {}, r"in float32, and the model is torch.bfloat16 on cpu; leave compile out"),
        (lambda model: model.to("meta"), {}, r"runs on the CPU in float32, and the model is torch.float32 on meta"),
        (lambda model: None, dict(exit=StableArgmax()), r"knows the exits Gate and StateChange, not StableArgmax\(pat"),
        (lambda model: setattr(model.recurrent, "act", Own(32)), dict(exit=Gate()), r"use StateChange in place"),
        (lambda model: model.recurrent.act.register_forward_hook(print), dict(exit=Gate()), r"own gate alone"),
        (lambda model: setattr(model.recurrent.act, "forward", len), dict(exit=Gate()), r"own gate alone"),
        (lambda model: None, dict(draft_loops=1), r"draft_loops several at once; leave out one"),
        (lambda model: model.coda[0].register_forward_hook(print), {}, r"the model has hooks, replaced"),
        (lambda model: model.head.register_forward_hook(print), {}, r"the model has hooks, replaced"),
        (lambda model: setattr(model, "norm", torch.nn.LayerNorm(32)), {}, r"the model has hooks, replaced"),
    ],
)  # fmt: skip
def test_what_cannot_be_compiled_says_what_to_change(change, options, words):
    model = a_model(**PLAIN)
    change(model)
    with pytest.raises(ValueError, match=words):
        model.stream(torch.zeros(1, 3, dtype=torch.long), 4, compile=True, **options)


def test_without_a_compiler_or_with_a_broken_one(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(build, "compiler", lambda: None)
            with pytest.raises(ValueError, match="install gcc or clang, or set"):
                a_model(**PLAIN).generate(ids(1, 3), 2, compile=True)
        monkeypatch.setattr(build, "compiler", lambda: ["false"])
        with pytest.raises(ValueError, match=r"false .* failed"):
            a_model(**PLAIN).generate(ids(1, 3), 2, compile=True)
    finally:
        build.library.cache_clear()


@needs_compiler
def test_it_is_compiled_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        build.library.__wrapped__(code.SOURCE)
        monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert [path.suffix for path in (tmp_path / "open_mythos").iterdir()] == [".so"]


@needs_compiler
def test_new_compiler_flags_are_another_file():
    keys = {build._key(words, code.SOURCE) for words in (["cc"], ["clang"], ["cc", "-O2"])}
    assert len(keys) == 3


def test_python_without_its_c_is_told(monkeypatch, tmp_path):
    """As in a folder for transformers."""
    monkeypatch.setattr(code, "SOURCE", tmp_path / "decode.c")
    with pytest.raises(ValueError, match=r"leave compile out: decode\.c is in the package only"):
        code.compiled()
