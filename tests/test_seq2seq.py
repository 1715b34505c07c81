"""A bidirectional encoder, a decoder that reads its states as a prefix, and generation from embeddings."""

from __future__ import annotations

import pytest
import reverse
import torch
from helpers import ATTENTION, assert_near, left_padding, tiny_config, tiny_model, tokens

from open_mythos import CheckpointError, OpenMythos, Seq2Seq
from open_mythos.generation.speculative import Draft


def tiny_seq2seq(attn_type: str = "gqa", **decoder) -> Seq2Seq:
    """In eval mode; encoder and decoder differ in vocabulary and weights."""
    encoder = tiny_model(attn_type, causal=False)
    return Seq2Seq(encoder, tiny_model(attn_type, **{"seed": 1, "vocab_size": 17, **decoder})).eval()


MODELS = {attn_type: tiny_seq2seq(attn_type) for attn_type in ATTENTION}
SOURCE, TARGET = tokens(2, 7), tokens(2, 5, seed=1, high=17)


@torch.no_grad()
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_the_decoder_reads_encoder_states_as_a_prefix_with_separate_loops(attn_type):
    model = MODELS[attn_type]
    logits = model(SOURCE, TARGET, n_loops=2, encoder_loops=3)
    assert logits.shape == (2, 5, 17)
    prefix = model.encoder.hidden(SOURCE, 3) / 32**0.5
    by_hand = model.decoder(torch.cat([prefix, model.decoder.embed(TARGET[:, :4])], 1), 2)[:, 6:]
    assert_near(logits, by_hand)
    for other in (model(SOURCE, TARGET, 1, 3), model(SOURCE, TARGET, 2, 1)):
        assert (logits - other).abs().max() > 1e-3


@torch.no_grad()
def test_the_encoder_is_bidirectional_and_the_decoder_causal():
    model, changed = MODELS["gqa"], SOURCE.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 23
    assert (model.encode(SOURCE) - model.encode(changed)).abs().amax((0, 2)).min() > 1e-3
    later = TARGET.clone()
    later[:, 2] = (later[:, 2] + 1) % 17
    moved = (model(SOURCE, TARGET) - model(SOURCE, later)).abs().amax((0, 2))
    assert moved[:3].max() < 1e-5 and moved[3:].min() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_a_padded_batch_matches_each_pair_alone(attn_type):
    model, mask = MODELS[attn_type], left_padding([7, 4], 7)
    target = TARGET.clone()
    target[0, 3:] = -100
    together = model(SOURCE, target, 2, 3, mask)
    assert_near(together[:1, :3], model(SOURCE[:1], TARGET[:1, :3], 2, 3))
    assert_near(together[1:], model(SOURCE[1:, 3:], TARGET[1:], 2, 3))
    total = sum(model.loss(SOURCE[i : i + 1, s:], TARGET[i : i + 1, :u]) * u for i, s, u in ((0, 0, 3), (1, 3, 5)))
    assert_near(model.loss(SOURCE, target, source_mask=mask), total / 8)
    new = model.generate(SOURCE, 6, 2, 3, mask, temperature=0)
    assert torch.equal(new[0], model.generate(SOURCE[:1], 6, 2, 3, temperature=0)[0])
    assert torch.equal(new[1], model.generate(SOURCE[1:, 3:], 6, 2, 3, temperature=0)[0])


@torch.no_grad()
@pytest.mark.parametrize("mask", [None, left_padding([7, 4], 7)], ids=["whole", "padded"])
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_generated_tokens_match_greedy_decoding_without_a_cache(attn_type, mask):
    model, target = MODELS[attn_type], torch.zeros(2, 1, dtype=torch.int64)
    for _ in range(8):
        new = model(SOURCE, target, 3, 2, mask)[:, -1].argmax(-1)
        target = torch.cat([target[:, :-1], new[:, None], target[:, :1] * 0], 1)
    for engine in ("auto", "modules", "fused"):
        found = model.generate(SOURCE, 8, 3, 2, mask, temperature=0, engine=engine)
        assert torch.equal(found, target[:, :-1]), engine


def test_generate_accepts_the_decoders_options_and_keeps_the_training_mode():
    model = tiny_seq2seq(halting=False)
    model.encoder.cfg.state_noise = 9.0  # acts in training only
    plain = model.generate(SOURCE, 6, 4, temperature=0)
    assert plain.shape == (2, 6) and plain.dtype == torch.int64
    assert torch.equal(model.train().generate(SOURCE, 6, 4, temperature=0), plain)
    assert all(module.training for module in model.modules())
    assert torch.equal(model.generate(SOURCE, 6, 4, temperature=0, draft=Draft(1, 2)), plain)
    drawn = [model.generate(SOURCE, 6, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*drawn)
    ended = model.generate(SOURCE, 6, 4, temperature=0, eos_token_id=int(plain[0, 1]))
    assert (ended[0, 1:] == plain[0, 1]).all()
    assert model.generate(SOURCE, 0).shape == (2, 0)


def test_the_loss_has_a_gradient_in_every_weight_of_both_models():
    model = tiny_seq2seq().train()
    model.loss(SOURCE, TARGET).backward()
    idle = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not idle


def test_a_loaded_pair_gives_the_same_logits(tmp_path):
    model = tiny_seq2seq("mla")
    model.save_pretrained(tmp_path / "pair")
    loaded = Seq2Seq.from_pretrained(tmp_path / "pair")
    assert not any(module.training for module in loaded.modules())
    assert torch.equal(loaded(SOURCE, TARGET), model(SOURCE, TARGET))
    with pytest.raises(CheckpointError, match=r"encoder.config\.json is missing"):
        Seq2Seq.from_pretrained(tmp_path)


def test_incompatible_encoder_and_decoder_are_refused():
    causal, both = tiny_config(), tiny_config(causal=False)
    for encoder, decoder, message in [
        (causal, causal, "the encoder was built with causal=True.*use causal=False"),
        (both, both, "the decoder was built with causal=False.*use causal=True"),
        (both, tiny_config(dim=64), "the encoder has dim=32, but the decoder.*64"),
    ]:
        with pytest.raises(ValueError, match=message):
            Seq2Seq(OpenMythos(encoder), OpenMythos(decoder))


@pytest.mark.parametrize("source, target, mask, message", [
    (tokens(1, 33), TARGET[:1], None, "source of 33 tokens .* take 33 positions of the encoder"),
    (tokens(1, 30), tokens(1, 4, high=17), None, "source of 30 tokens and a target of 4 take 33 .* decoder"),
    (SOURCE, TARGET + 30, None, "target holds .*0 to 16"),
    (SOURCE, TARGET.float(), None, "target is .*float32; pass"),
    (SOURCE.float(), TARGET, None, "source is .*float32; pass"),
    (SOURCE, TARGET.masked_fill(torch.arange(5) == 1, -100), None, "-100 before tokens; pad it on the right"),
    (SOURCE, TARGET, left_padding([7, 4], 7).flip(1), "pad prompts on the left"),
    (SOURCE, TARGET, left_padding([6, 4], 6), r"attention_mask has shape \(2, 6\); use \(2, 7\)"),
    (SOURCE, TARGET[:1], None, "source has 2 rows, but target 1"),
])  # fmt: skip
def test_invalid_source_target_or_mask_is_refused(source, target, mask, message):
    with pytest.raises(ValueError, match=message):
        MODELS["gqa"].loss(source, target, source_mask=mask)


@pytest.mark.parametrize(("options", "message"), [
    ({"max_new_tokens": 40}, "max_seq_len=32"), ({"n_loops": 0}, "n_loops=0"), ({"engine": "fastest"}, "engine"),
    ({"eos_token_id": 17}, "eos_token_id=17"), ({"draft": Draft(9, 2), "n_loops": 4}, "draft"),
])  # fmt: skip
def test_invalid_decoder_options_are_refused_before_encoding(monkeypatch, options, message):
    model = MODELS["gqa"]
    monkeypatch.setattr(model.encoder, "hidden", lambda *args, **given: pytest.fail("the source was encoded"))
    with pytest.raises(ValueError, match=message):
        model.generate(SOURCE, **{"max_new_tokens": 4, **options})


def test_source_and_target_may_fill_the_decoders_max_seq_len():
    model = MODELS["gqa"]
    assert model(tokens(1, 29), tokens(1, 4, high=17)).shape == (1, 4, 17)
    assert model.generate(tokens(1, 28), 4).shape == (1, 4)
    with pytest.raises(ValueError, match="max_seq_len=32"):
        model.generate(tokens(1, 28), 6)


def test_generation_from_embeddings_equals_generation_from_their_tokens():
    model, ids = tiny_model(), tokens(2, 7)
    after = model.generate(model.embed(ids).detach(), 6, temperature=0)
    assert torch.equal(after, model.generate(ids, 6, temperature=0)[:, 7:])
    for wrong in (torch.zeros(2, 7, 31), torch.zeros(2, 0, 32)):
        with pytest.raises(ValueError, match=r"use \(batch, tokens, 32\)"):
            model.generate(wrong, 2)


def test_a_seq2seq_model_learns_to_reverse_words():
    torch.manual_seed(0)
    model = reverse.make()
    reverse.train(model, 240, longest=4)
    source, mask, target = reverse.batch(128, longest=4)
    assert reverse.share_right(reverse.write(model, source, mask, 4), target) >= 0.95
