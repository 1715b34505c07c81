"""The mixture recurrence, as in the public reference: exactness, caching, training, decoding, diagnostics."""

import pytest
import torch
from helpers import ATTENTION, assert_near, gradients, left_padding, loops_used, tiny_config, tiny_model, tokens

from open_mythos import KVCache, OpenMythos
from open_mythos.diagnostics import flops_per_token, loop_gain, trace
from open_mythos.model import UnrolledMythos
from open_mythos.nn.exits import Gate, PredictionKL
from open_mythos.nn.injection import LTIInjection
from open_mythos.quantization import quantize_int8
from open_mythos.reference import reference_logits

MIXTURE = dict(recurrence="mixture", router_score="softmax", halting=False, loop_index_dim=5)


def mixture(attn_type: str = "gqa", **changes) -> OpenMythos:
    return tiny_model(attn_type, **{**MIXTURE, **changes})


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("changes", [
    {}, dict(halting=True), dict(conv_taps=0, local_window=0, input_norm=False), dict(state_norm=False, lora_rank=0),
    dict(state_init="zero", act_threshold=0.4), dict(router_score="sigmoid", loop_index_dim=0),
    dict(n_experts_per_tok=1),
], ids=str)  # fmt: skip
def test_logits_and_gradients_equal_the_plain_reference(attn_type, training, changes):
    model, ids = mixture(attn_type, **changes).train(training), tokens(3, 8)
    real = left_padding([8, 5, 2], 8)
    weight = torch.randn(3, 8, 23, generator=torch.Generator().manual_seed(1)) * real[..., None]
    for n_loops in (1, 2, 7):
        actual, expected = (run(model, ids, n_loops, attention_mask=real) for run in (OpenMythos.__call__, plain))
        assert_near(actual[real], expected[real], what=f"{n_loops} loops")
    found, wanted = (gradients(model, (logits * weight).sum()) for logits in (actual, expected))
    for name, gradient in wanted.items():
        assert_near(found[name], gradient, 1e-4, name)


def plain(model, ids, n_loops, attention_mask):
    return reference_logits(model, ids, n_loops, attention_mask)


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("halting", [False, True])
@pytest.mark.parametrize("chunks", [[1] * 8, [5, 3], [2, 1, 5]], ids=str)
def test_a_cache_does_not_change_the_logits(attn_type, halting, chunks):
    model, ids = mixture(attn_type, halting=halting), tokens(2, 8)
    whole, cache = model(ids, 5), KVCache()
    parts = [model(part, 5, kv_cache=cache) for part in ids.split(chunks, 1)]
    assert_near(torch.cat(parts, 1), whole)


def test_mixture_weights_follow_the_gate_and_the_last_loop_gets_the_rest():
    model = mixture(act_threshold=0.9).double()
    model.recurrent.act.forward = lambda state: torch.full(state.shape[:2], 0.4, dtype=torch.float64)
    e = torch.randn(1, 1, 32, dtype=torch.float64)
    _, ctx = model.encode(tokens(1, 1))
    states = [state.h for state in model.recurrent.iterate(model.recurrent.begin(e), e, ctx, n_loops=5)]
    h = [state[..., :32] for state in states]
    for n_loops, shares in [(1, [0.4]), (2, [0.4, 0.4]), (3, [0.4, 0.4, 0.2]), (5, [0.4, 0.4, 0.2, 0.0, 0.0])]:
        wanted = sum(share * at for share, at in zip(shares, h, strict=False))
        assert_near(model.recurrent.output(states[n_loops - 1]), wanted, 1e-12)


def test_halting_stops_a_position_when_its_mixture_is_complete():
    ids = tokens(2, 8)
    made, whole = mixture(halting=True, act_threshold=0.5), mixture(act_threshold=0.5)
    used = loops_used(made, ids, 12)
    assert used.float().mean() < 8 and loops_used(whole, ids, 12).eq(12).all()
    assert trace(made, ids, 12).loops_used.equal(used)
    assert_near(made(ids, 12), whole(ids, 12, exit=Gate(0.5)))


def test_the_decay_may_be_zero_or_one_without_a_margin():
    injection = LTIInjection(4, margin=0.0)
    with torch.no_grad():
        injection.raw_A.copy_(torch.tensor([0.0, 1.0, 0.9999, 1e-6]))
    assert injection.get_A().equal(injection.raw_A)
    assert mixture().recurrent.injection.margin == 0 and 0 < tiny_model().recurrent.injection.margin < 0.01


def test_softmax_router_weights_are_normalised_over_the_chosen_experts():
    ffn, x = mixture(n_experts_per_tok=3).recurrent.block.ffn, torch.randn(50, 32)
    chosen, weights = ffn.route(x)
    scores = ffn.router(x).softmax(-1).gather(1, chosen)
    assert_near(weights, scores / scores.sum(-1, keepdim=True), 1e-6)
    assert mixture(n_experts_per_tok=1).recurrent.block.ffn.route(x)[1].eq(1).all()


@pytest.mark.parametrize("options", [
    dict(), dict(draft_loops=1), dict(cache_loops=2), dict(exit=Gate(0.9)), dict(exit=PredictionKL(0.1)),
], ids=str)  # fmt: skip
def test_generation_works_with_drafts_cached_loops_and_exits(options):
    model, ids = mixture(), tokens(2, 4)
    made = model.generate(ids, 6, n_loops=4, temperature=0, **options)
    if options.keys() <= {"draft_loops"}:
        expected = ids
        for _ in range(6):
            expected = torch.cat([expected, model(expected, 4)[:, -1:].argmax(-1)], 1)
        assert made.equal(expected)


def test_rows_at_different_loops_are_decoded_together():
    model = mixture("mla")
    prompts = [tokens(5, seed=1), tokens(3, seed=2)]
    together = model.generate_many(prompts, 4, n_loops=[2, 5], temperature=0)
    for made, prompt, n_loops in zip(together, prompts, (2, 5), strict=True):
        assert made.equal(model.generate(prompt[None], 4, n_loops=n_loops, temperature=0)[0])


def test_native_decoding_refuses_a_mixture_and_softmax_scores():
    for model in (mixture(router_score="sigmoid"), tiny_model(router_score="softmax", halting=False)):
        with pytest.raises(ValueError, match="it supports recurrence='injected', router_score='sigmoid'"):
            model.generate(tokens(1, 3), 2, engine="native")


def test_int8_and_bfloat16_logits_stay_close():
    ids = tokens(2, 6)
    wanted = mixture()(ids, 3)
    assert (mixture().bfloat16()(ids, 3).float() - wanted).abs().max() < 0.1 * wanted.abs().max()
    assert (quantize_int8(mixture())(ids, 3) - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_loop_gain_is_measured_in_the_state_only():
    model = mixture(lora_rank=0)
    gain = loop_gain(model, tokens(1, 5), 3)
    with torch.no_grad():
        model.recurrent.act.halt.bias.fill_(-20.0)  # what is carried beside the state does not matter
    assert loop_gain(model, tokens(1, 5), 3) == pytest.approx(gain)


def test_flops_count_the_gate_with_and_without_halting():
    with_gate, without = (flops_per_token(tiny_config(**{**MIXTURE, "halting": on}), 4, 5) for on in (True, False))
    assert with_gate == without
    more = tiny_config(**{**MIXTURE, "lora_rank": 0, "recurrence": "injected", "halting": False})
    assert flops_per_token(tiny_config(**{**MIXTURE, "lora_rank": 0}), 4, 5) - flops_per_token(more, 4, 5) == 2 * 4 * 32


def test_the_unrolled_baseline_has_no_mixture():
    assert UnrolledMythos(tiny_config(**MIXTURE)).cfg.recurrence == "injected"


def test_training_lowers_the_loss_and_updates_the_gate():
    model, ids = mixture(halting=True).train(), tokens(16, 8)
    gate = model.recurrent.act.halt.weight.clone()
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-3), []
    for _ in range(15):
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1], 3).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0] and not model.recurrent.act.halt.weight.equal(gate)
