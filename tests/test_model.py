"""The whole model, mainly compared with the plain implementation in ``open_mythos.reference``."""

import math

import numpy as np
import pytest
import torch
from helpers import (
    ATTENTION,
    assert_near,
    gradients,
    left_padding,
    loops_used,
    tiny_config,
    tiny_model,
    tokens,
)
from hypothesis import given
from hypothesis import strategies as st

from open_mythos import KVCache, MythosConfig, OpenMythos
from open_mythos.reference import reference_logits

MODELS = {attn_type: tiny_model(attn_type) for attn_type in ATTENTION}
VARIATIONS = [
    {},
    dict(state_norm=False),
    dict(conv_taps=0, local_window=0),
    dict(conv_taps=1, local_window=1),
    dict(conv_taps=5, local_window=50),
    dict(lora_rank=0, loop_index_dim=8),
    dict(prelude_layers=0, coda_layers=2, state_init="zero"),
    dict(prelude_layers=2, coda_layers=0, n_shared_experts=0),
    dict(prelude_layers=0, coda_layers=0, halting=False),
    dict(n_heads=6, n_kv_heads=3, dim=36, n_experts=3, n_experts_per_tok=3, expert_dim=7),
    dict(n_heads=1, n_kv_heads=1, dim=16, n_experts=1, n_experts_per_tok=1),
    dict(n_heads=4, n_kv_heads=1, act_threshold=0.5),
    dict(input_norm=False),
    dict(core_layers=2, norm_eps=1e-3),
    dict(core_layers=3, n_experts=0, dense_dim=29, tied_head=False, bridge_dim=12),
    dict(rope_factor=8.0, rope_context=12, rope_theta=50.0),
]


# -- compared with the reference


@pytest.mark.parametrize("changes", VARIATIONS, ids=str)
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_logits_match_the_reference(attn_type, changes):
    model, ids = tiny_model(attn_type, **changes), tokens(2, 9)
    mask = left_padding([9, 6], 9)
    for n_loops, attention_mask in ((1, None), (4, None), (6, mask)):
        real = slice(None) if attention_mask is None else attention_mask
        actual = model(ids, n_loops, attention_mask=attention_mask)
        assert_near(actual[real], reference_logits(model, ids, n_loops, attention_mask)[real])


@pytest.mark.parametrize(
    "changes", [VARIATIONS[0], VARIATIONS[2], VARIATIONS[6], VARIATIONS[7], *VARIATIONS[-2:]], ids=str
)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_gradients_with_halting_match_the_reference(attn_type, padded, changes):
    model, ids = tiny_model(attn_type, **changes), tokens(2, 8)
    mask = left_padding([8, 5], 8) if padded else torch.ones(2, 8, dtype=torch.bool)
    assert len(loops_used(model, ids, 5)[mask].unique()) > 1
    weight = torch.randn(2, 8, 23, generator=torch.Generator().manual_seed(0)) * mask[..., None]
    actual = gradients(model, (model(ids, 5, attention_mask=mask) * weight).sum())
    expected = gradients(model, (reference_logits(model, ids, 5, mask) * weight).sum())
    for name in expected:
        assert_near(actual[name], expected[name], 5e-5, name)


@pytest.mark.parametrize("changes", [VARIATIONS[0], VARIATIONS[5], VARIATIONS[7], *VARIATIONS[-2:]], ids=str)
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_training_logits_and_gradients_match_the_reference(attn_type, changes):
    model, ids, mask = tiny_model(attn_type, **changes).train(), tokens(2, 8), left_padding([8, 5], 8)
    weight = torch.randn(2, 8, 23, generator=torch.Generator().manual_seed(0)) * mask[..., None]
    logits = model(ids, 5, attention_mask=mask)
    expected_logits = reference_logits(model, ids, 5, mask)
    assert_near(logits[mask], expected_logits[mask])
    actual = gradients(model, (logits * weight).sum())
    expected = gradients(model, (expected_logits * weight).sum())
    for name in expected:
        if not name.startswith("recurrent.act."):  # the gate is trained separately
            assert_near(actual[name], expected[name], 5e-5, name)


def test_the_reference_refuses_dropout_in_training():
    with pytest.raises(ValueError, match=r"dropout=0\.5"):
        reference_logits(tiny_model(dropout=0.5).train(), tokens(1, 3))


@pytest.mark.parametrize("attn_type", ATTENTION)
@given(seed=st.integers(0, 10**6), n_loops=st.integers(1, 6), gate_bias=st.floats(-4, 2))
def test_logits_match_the_reference_for_random_weights(attn_type, seed, n_loops, gate_bias):
    model = tiny_model(attn_type, seed=seed, gate_bias=gate_bias, dim=16, expert_dim=5)
    ids = tokens(2, 6, seed=seed)
    assert_near(model(ids, n_loops), reference_logits(model, ids, n_loops), 5e-5)


# -- padding and causality


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("attn_type", ATTENTION)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), on_the_left=st.booleans(), n_loops=st.integers(1, 5)
)
def test_a_padded_batch_gives_the_logits_of_each_row_alone(attn_type, training, lengths, on_the_left, n_loops):
    model, ids = MODELS[attn_type].train(training), tokens(len(lengths), 9)
    mask = left_padding(lengths, 9) if on_the_left else left_padding(lengths, 9).flip(1)
    with torch.no_grad():
        together = model(ids, n_loops, attention_mask=mask)
        for row, real in enumerate(mask):
            alone = model(ids[row : row + 1, real], n_loops)[0]
            assert_near(together[row, real], alone)
    model.eval()


@pytest.mark.parametrize("n_loops", [3, 16])
@pytest.mark.parametrize("on_the_left", [True, False])
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_a_padded_batch_gives_the_gradients_of_each_row_alone(attn_type, on_the_left, n_loops):
    """The norm of a zero state has derivatives of about 1000, which multiply over loops; none may reach a gradient."""
    model, ids = tiny_model(attn_type).train(), tokens(3, 7)
    mask = left_padding([7, 4, 1], 7) if on_the_left else left_padding([7, 4, 1], 7).flip(1)
    weight = torch.randn(3, 7, 23, generator=torch.Generator().manual_seed(0)) * mask[..., None]
    together = gradients(model, (model(ids, n_loops, attention_mask=mask) * weight).sum())
    rows = zip(ids, weight, mask, strict=True)
    alone = gradients(model, torch.stack([(model(i[m][None], n_loops)[0] * w[m]).sum() for i, w, m in rows]).sum())
    for name in alone:
        if not name.startswith("recurrent.act."):
            assert_near(together[name], alone[name], 1e-4, name)


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_a_loss_at_padding_has_no_effect_on_gradients(attn_type):
    model, ids, mask = tiny_model(attn_type).train(), tokens(2, 7), left_padding([7, 3], 7)

    def likelihood():
        return model(ids, 16, attention_mask=mask).log_softmax(-1)[..., 0]

    everywhere, real = gradients(model, likelihood().sum()), gradients(model, likelihood()[mask].sum())
    for name in real:
        if name != "embed.weight":  # the tied head also gets a gradient at padding
            assert_near(everywhere[name], real[name], what=name)
    assert everywhere["embed.weight"].isfinite().all()


@pytest.mark.parametrize("attn_type", ATTENTION)
@given(at=st.integers(0, 9), n_loops=st.integers(1, 5), training=st.booleans())
def test_changing_a_token_leaves_earlier_logits_unchanged(attn_type, at, n_loops, training):
    model, ids = MODELS[attn_type].train(training), tokens(2, 10)
    changed = ids.clone()
    changed[:, at] = (changed[:, at] + 1) % 23
    with torch.no_grad():
        before, after = model(ids, n_loops), model(changed, n_loops)
    model.eval()
    assert_near(after[:, :at], before[:, :at], 1e-6)
    assert not torch.equal(after[:, at], before[:, at])


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_no_gradient_reaches_later_tokens(attn_type):
    model, ids = MODELS[attn_type], tokens(1, 8)
    e, ctx = model.encode(ids)
    e = e.detach().requires_grad_()
    h = model.decode(model.recurrent(model.first_state(e, ctx), e, ctx, n_loops=4), ctx)
    (gradient,) = torch.autograd.grad(h[:, 4].sum(), e)
    assert gradient[:, 5:].eq(0).all() and gradient[:, :5].abs().sum(-1).gt(0).all()


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("cache_type", [None, KVCache, dict])
def test_logits_of_padding_only_are_finite(attn_type, cache_type):
    model = MODELS[attn_type]
    cache = cache_type and cache_type()
    with torch.no_grad():
        assert model(tokens(2, 4), 3, cache, attention_mask=torch.zeros(2, 4)).isfinite().all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_single_tokens_and_rows_of_padding_only(attn_type, training):
    model = tiny_model(attn_type).train(training)
    assert model(tokens(1, 1), 3).shape == (1, 1, 23)
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    ids = tokens(2, 3)
    logits = model(ids, 3, attention_mask=mask)
    assert logits.isfinite().all()
    assert_near(logits[:1], model(ids[:1], 3))


@pytest.mark.parametrize("on_the_left", [True, False])
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_padding_is_not_counted_as_expert_load(attn_type, on_the_left):
    model, mask = tiny_model(attn_type, prelude_layers=1).train(), left_padding([6, 2], 6)
    model(tokens(2, 6), 3, attention_mask=mask if on_the_left else mask.flip(1))
    assert model.recurrent.block.ffn.expert_load.sum() == (6 + 2) * 3 * 2  # tokens, loops, experts per token


# -- limits


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("cache_type", [KVCache, dict])
def test_positions_up_to_max_seq_len_work_and_more_are_refused(attn_type, cache_type):
    model = tiny_model(attn_type, max_seq_len=10)
    ids = tokens(1, 11)
    with torch.no_grad():
        whole = model(ids[:, :10], 2)
        with pytest.raises(ValueError, match="max_seq_len=10"):
            model(ids, 2)
        with pytest.raises(ValueError, match="max_seq_len=10"):
            model(ids[:, :2], 2, start_pos=9)
        assert model(ids[:, :1], 2, start_pos=9).shape == (1, 1, 23)
        cache = cache_type()
        model(ids[:, :8], 2, cache)
        with pytest.raises(ValueError, match="max_seq_len=10"):
            model(ids[:, 8:], 2, cache)
        assert_near(model(ids[:, 8:10], 2, cache), whole[:, 8:])
        with pytest.raises(ValueError, match="max_seq_len=10"):
            model(ids[:, 10:], 2, cache)
        assert model.generate(ids[:, :7], 4, n_loops=2).shape == (1, 11)
        with pytest.raises(ValueError, match="max_seq_len=10"):
            model.generate(ids[:, :7], 5, n_loops=2)


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_max_seq_len_may_be_raised_after_training(attn_type):
    model = tiny_model(attn_type, max_seq_len=8)
    with torch.no_grad():
        short = model(tokens(1, 8), 2)
        model.cfg.max_seq_len = 20
        assert model(tokens(1, 20), 2).shape == (1, 20, 23)
        assert_near(model(tokens(1, 8), 2), short, 0.0)
        assert model.generate(tokens(1, 8), 12, n_loops=2).shape == (1, 20)


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_max_loop_iters_may_be_changed_after_training(attn_type):
    model, ids = tiny_model(attn_type, max_loop_iters=4), tokens(1, 5)
    with torch.no_grad():
        for n_loops in (1, 2, 9):
            expected = model(ids, n_loops)
            model.cfg.max_loop_iters = n_loops
            assert_near(model(ids), expected, 0.0)


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("coda_layers", [0, 1, 3])
@pytest.mark.parametrize("last", [1, 3, 40])
def test_hidden_with_last_equals_the_last_positions_of_a_full_pass(attn_type, coda_layers, last):
    model = tiny_model(attn_type, coda_layers=coda_layers, max_seq_len=64)
    ids, mask = tokens(3, 40), left_padding([7, 33, 40], 40)
    caches = KVCache(), KVCache()
    whole = model.hidden(ids, 3, caches[0], attention_mask=mask)
    found = model.hidden(ids, 3, caches[1], attention_mask=mask, last=last)
    assert found.shape == (3, last, model.cfg.dim)
    assert_near(found, whole[:, -last:])
    following = [model(ids[:, :2], 3, kv_cache=cache) for cache in caches]
    assert_near(*following)  # both caches hold all positions


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_hidden_with_last_runs_the_final_feed_forward_on_one_position(attn_type):
    model, seen = tiny_model(attn_type, coda_layers=2), []
    for block in model.coda:
        block.ffn.register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
    model.hidden(tokens(2, 9), 2, last=1)
    assert seen == [9, 1]


def test_n_loops_may_be_any_positive_integer():
    model, ids = MODELS["gqa"], tokens(1, 3)
    with torch.no_grad():
        assert_near(model(ids, np.int64(3)), model(ids, 3), 0.0)
        assert_near(model(ids), model(ids, model.cfg.max_loop_iters), 0.0)
        assert model(ids, 5 * model.cfg.max_loop_iters).isfinite().all()


@pytest.mark.parametrize("training", [False, True])
def test_logits_are_finite_far_beyond_the_trained_loops(training):
    model = tiny_model(lora_rank=3, loop_index_dim=8, halting=False).train(training)
    with torch.no_grad():
        assert model(tokens(1, 4), 200).isfinite().all()


def test_negative_start_pos_is_refused():
    with pytest.raises(ValueError, match="start_pos=-1"):
        MODELS["gqa"](tokens(1, 2), 1, start_pos=-1)


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_start_pos_shifts_all_positions_without_changing_logits(attn_type):
    model, ids = MODELS[attn_type], tokens(1, 6)
    with torch.no_grad():
        assert_near(model(ids, 3, start_pos=20), model(ids, 3), 1e-4)


# -- bidirectional models


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize(
    "changes", [{}, dict(conv_taps=2, local_window=0), dict(conv_taps=4, local_share=1.0)], ids=str
)
def test_a_bidirectional_model_matches_the_reference(attn_type, changes):
    model, ids, mask = tiny_model(attn_type, causal=False, **changes), tokens(2, 9), left_padding([9, 6], 9)
    for n_loops, real in ((1, None), (5, None), (5, mask)):
        found = model(ids, n_loops, attention_mask=real)
        expected = reference_logits(model, ids, n_loops, real)
        assert_near(found if real is None else found[real], expected if real is None else expected[real])
    model.train()
    weight = torch.randn(2, 9, 23, generator=torch.Generator().manual_seed(0)) * mask[..., None]
    actual = gradients(model, (model(ids, 3, attention_mask=mask) * weight).sum())
    expected = gradients(model, (reference_logits(model, ids, 3, mask) * weight).sum())
    for name in expected:
        if not name.startswith("recurrent.act."):
            assert_near(actual[name], expected[name], 5e-5, name)


@torch.no_grad()
@pytest.mark.parametrize("on_the_left", [True, False])
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_bidirectional_padded_rows_and_packed_documents_match_each_alone(attn_type, on_the_left):
    model, ids = tiny_model(attn_type, causal=False), tokens(2, 9)
    mask = left_padding([9, 5], 9) if on_the_left else left_padding([9, 5], 9).flip(1)
    together, alone = model(ids, 4, attention_mask=mask), model(ids[1:, mask[1]], 4)
    assert_near(together[1:, mask[1]], alone)
    documents = torch.tensor([[1] * 4 + [2] * 5])
    packed = model(ids[:1], 4, attention_mask=documents)
    assert_near(packed, torch.cat([model(part, 4) for part in ids[:1].split([4, 5], 1)], 1))


@pytest.mark.parametrize("attn_type", ATTENTION)
@torch.no_grad()
def test_only_a_bidirectional_model_lets_later_tokens_change_earlier_logits(attn_type):
    ids = tokens(1, 8)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 23
    for causal in (True, False):
        model = tiny_model(attn_type, causal=causal)
        moved = (model(ids, 3) - model(changed, 3))[:, :-1].abs().amax(-1)
        assert moved.max() < 1e-5 if causal else moved.min() > 1e-3


def test_a_bidirectional_model_cannot_generate():
    model = tiny_model(causal=False)
    for call in (model.generate, model.stream):
        with pytest.raises(ValueError, match="causal=False and attends to later tokens"):
            call(tokens(1, 4), 2)


# -- dtypes


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_converting_to_bfloat16_and_back_only_rounds_the_weights(attn_type):
    model, ids = tiny_model(attn_type, halting=False), tokens(2, 12)
    with torch.no_grad():
        before = model(ids, 3)
        assert torch.equal(model.to(torch.float32)(ids, 3), before)
        stepwise = {name: p.bfloat16().float() for name, p in model.named_parameters()}
        bias = model.recurrent.block.ffn.router_bias.clone()
        model.to(torch.bfloat16).to(torch.float32)
        for name, p in model.named_parameters():
            assert torch.equal(p, stepwise[name]), name
        assert torch.equal(model.recurrent.block.ffn.router_bias, bias)
        # Only the weights are rounded: no buffer has lost its imaginary part or its precision.
        assert (model(ids, 3) - before).abs().mean() < 0.05 * before.abs().mean()
        assert_near(model(ids, 3), reference_logits(model, ids, 3))


def test_buffers_are_real_and_independent_of_the_context_length():
    small, large = tiny_model(max_seq_len=8), tiny_model(max_seq_len=4096)
    assert {n: b.shape for n, b in small.named_buffers()} == {n: b.shape for n, b in large.named_buffers()}
    assert not any(buffer.is_complex() for buffer in large.buffers())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_half_precision_trains_and_generates(attn_type, dtype):
    model, ids = tiny_model(attn_type).to(dtype).train(), tokens(2, 10)
    logits = model(ids, 4, attention_mask=left_padding([10, 7], 10))
    assert logits.dtype == dtype and logits.isfinite().all()
    torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids.flatten()).backward()
    for name, parameter in model.named_parameters():
        finite = parameter.grad is None or bool(parameter.grad.isfinite().all())
        assert finite, name
    assert model.recurrent.block.ffn.gate_up.grad.abs().sum() > 0
    assert model.generate(ids, 6, n_loops=4, attention_mask=left_padding([10, 7], 10)).shape == (2, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_half_precision_is_near_single_precision(attn_type, dtype):
    model, ids = tiny_model(attn_type, halting=False), tokens(2, 10)
    with torch.no_grad():
        exact = model(ids, 3)
        rounded = model.to(dtype)(ids, 3).float()
    # The chosen experts may differ at a few tokens, so the median of the logits is compared.
    off = (rounded - exact).abs().flatten().median() / exact.abs().median()
    assert off < 0.1


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_gradients_under_autocast_are_finite(attn_type):
    model, ids = tiny_model(attn_type).train(), tokens(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, 3).float().square().mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        finite = parameter.grad is None or bool(parameter.grad.isfinite().all())
        assert finite, name


# -- weight tying, initial state, noise, training


@pytest.mark.parametrize("make", [
    lambda model: model,
    lambda model: model.to(torch.bfloat16),
    lambda model: model.double(),
], ids=["new", "bfloat16", "float64"])  # fmt: skip
def test_head_and_embedding_share_one_tensor(make):
    model = make(OpenMythos(tiny_config()))
    assert model.head.weight is model.embed.weight


def test_head_and_embedding_share_one_tensor_after_leaving_the_meta_device():
    first = OpenMythos(tiny_config())
    for fill in (lambda model: model.to_empty(device="cpu"), lambda model: None):
        with torch.device("meta"):
            model = OpenMythos(tiny_config())
        fill(model)
        model.load_state_dict(first.state_dict(), assign=True)
        assert model.head.weight is model.embed.weight
        assert len(list(model.parameters())) == len(list(first.parameters()))
        assert torch.equal(model(tokens(1, 4), 2), first(tokens(1, 4), 2))


@pytest.mark.parametrize("copies", ["cast", "without the head"])
def test_head_and_embedding_share_one_tensor_after_copies_of_them_are_assigned(copies):
    first = OpenMythos(tiny_config()).double()
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    if copies == "without the head":
        del state["head.weight"]
    model = OpenMythos(tiny_config())
    model.load_state_dict(state, strict=copies == "cast", assign=True)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model(tokens(1, 4), 2), first(tokens(1, 4), 2))


def test_a_manually_untied_head_stays_untied():
    """Neither conversions of dtype and device nor load_state_dict tie it again."""
    model = OpenMythos(tiny_config())
    model.head.weight = torch.nn.Parameter(model.head.weight.detach() + 1)
    untied = model.head.weight.detach().clone()
    for made in (model.to(torch.float64).to(torch.float32), model.cpu(), model.half().float()):
        assert made.head.weight is not made.embed.weight
    assert_near(model.head.weight, untied, 1e-2)
    model.load_state_dict(model.state_dict(), assign=True)
    assert model.head.weight is not model.embed.weight


def test_tied_head_false_keeps_head_and_embedding_apart():
    model = OpenMythos(tiny_config(tied_head=False))
    assert model.to(torch.bfloat16).head.weight is not model.embed.weight
    model.load_state_dict(model.state_dict(), assign=True)
    assert model.head.weight is not model.embed.weight


def test_untrained_lora_does_not_change_logits():
    torch.manual_seed(0)
    model = OpenMythos(tiny_config(lora_rank=3)).eval()
    with torch.no_grad():
        before = model(tokens(2, 6), 3)
        model.recurrent.lora = None
        assert torch.equal(model(tokens(2, 6), 3), before)


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("training", [False, True])
def test_iterate_yields_the_logits_after_every_loop(attn_type, training):
    model, ids, mask = tiny_model(attn_type).train(training), tokens(2, 7), left_padding([7, 4], 7)
    with torch.no_grad():
        for state, logits in model.iterate(ids, 4, attention_mask=mask):
            assert state.ran.dtype == torch.bool and state.ran.shape == (2, 7)
            assert training or state.halting.shape == (2, 7)
            assert_near(logits[mask], model(ids, state.loop + 1, attention_mask=mask)[mask])


@pytest.mark.parametrize("state_init", ["input", "zero", "noise"])
@pytest.mark.parametrize("training", [False, True])
def test_first_state_follows_state_init(state_init, training):
    model = tiny_model(state_init=state_init).train(training)
    e, ctx = model.encode(tokens(2, 5), attention_mask=left_padding([3, 5], 5))
    first = model.first_state(e, ctx)
    if state_init == "input":
        assert torch.equal(first, e)
    elif state_init == "noise" and training:
        assert first[0, :2].eq(0).all() and first[0, 2:].std() > 0.5
        assert not torch.equal(first, model.first_state(e, ctx))
    else:
        assert first.eq(0).all()


def test_noise_and_dropout_act_in_training_only():
    ids = tokens(2, 6)
    for changes in (dict(dropout=0.3), dict(state_noise=0.3)):
        model = tiny_model(**changes)
        with torch.no_grad():
            assert torch.equal(model(ids, 3), model(ids, 3))
            model.train()
            assert not torch.equal(model(ids, 3), model(ids, 3))


def test_noise_keeps_logits_finite_and_states_at_padding_zero():
    model = tiny_model(state_noise=0.5, state_init="noise", dropout=0.2).train()
    mask = left_padding([6, 3], 6)
    for state, logits in model.iterate(tokens(2, 6), 3, attention_mask=mask):
        assert logits.isfinite().all() and state.h[~mask].eq(0).all()


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    model = OpenMythos(tiny_config(n_experts=2, dim=32)).train()
    ids = tokens(4, 8)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        logits = model(ids[:, :-1], 2)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] < math.log(23) * 2 and losses[-1] < 0.4 * losses[0], losses


def test_the_config_starts_with_the_fields_of_the_reference():
    fields = list(MythosConfig.__dataclass_fields__)
    assert fields[:23] == [
        "vocab_size", "dim", "n_heads", "n_kv_heads", "max_seq_len", "max_loop_iters", "prelude_layers", "coda_layers",
        "attn_type", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "n_experts",
        "n_shared_experts", "n_experts_per_tok", "expert_dim", "act_threshold", "rope_theta", "lora_rank",
        "max_output_tokens", "dropout",
    ]  # fmt: skip


# -- torch.compile


@pytest.mark.parametrize("attn_type, training, backend", [("gqa", True, "inductor"), ("mla", False, "aot_eager")])
def test_the_recurrent_block_compiles_without_a_graph_break(attn_type, training, backend):
    model, ids = tiny_model(attn_type).train(training), tokens(2, 6)
    e, ctx = model.encode(ids)
    e = e.detach()
    block = model.recurrent.block
    eager_in, compiled_in = e.clone().requires_grad_(), e.clone().requires_grad_()
    eager = block(eager_in, ctx)
    counted = block.ffn.expert_load.clone()
    block.ffn.expert_load.zero_()
    block.compile(fullgraph=True, backend=backend)
    compiled = block(compiled_in, model.encode(ids)[1])
    assert_near(compiled, eager)
    assert torch.equal(block.ffn.expert_load, counted) and bool(counted.sum()) == training
    parameters = list(block.parameters())
    expected = torch.autograd.grad(eager.square().sum(), [eager_in, *parameters])
    for actual, wanted in zip(
        torch.autograd.grad(compiled.square().sum(), [compiled_in, *parameters]), expected, strict=True
    ):
        assert_near(actual, wanted, 5e-5)
