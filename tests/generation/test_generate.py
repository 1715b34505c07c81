"""Generation: sampling filters as pure functions, and the decoding loop around the model."""

import pytest
import torch
from helpers import ATTENTION, assert_near, left_padding, tiny_model, tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from open_mythos import KVCache, OpenMythos
from open_mythos.generation.sampling import Sampling, keep_min_p, keep_top_k, keep_top_p
from open_mythos.nn.exits import StateChange

MODELS = {attn_type: tiny_model(attn_type) for attn_type in ATTENTION}
rows = st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12, unique=True).map(lambda r: torch.tensor([r]))


def uncached_greedy(model: OpenMythos, ids: Tensor, n_new: int, n_loops: int) -> Tensor:
    """Greedy decoding that computes the whole sequence again for every token."""
    for _ in range(n_new):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, n_loops)[:, -1:].argmax(-1)], 1)
    return ids


def probabilities(logits: Tensor, **options) -> Tensor:
    return Sampling(**{"top_k": None, **options}).probabilities(logits)


# -- sampling


@given(rows, st.floats(0.1, 5))
def test_temperature_divides_the_logits(logits, temperature):
    assert_near(probabilities(logits, temperature=temperature), (logits / temperature).softmax(-1))


@given(rows)
def test_temperature_zero_is_argmax(logits):
    assert torch.equal(
        probabilities(logits, temperature=0), torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[1])
    )
    assert torch.equal(Sampling(temperature=0).draw(logits), logits.argmax(-1))


@given(rows, st.integers(1, 15))
def test_top_k_keeps_the_k_most_likely_tokens(logits, k):
    kept = probabilities(logits, top_k=k) > 0
    n = min(k, logits.shape[1])
    assert kept.sum() == n
    assert set(kept[0].nonzero().flatten().tolist()) == set(logits[0].topk(n).indices.tolist())


@given(rows, st.floats(0.01, 1.0))
def test_top_p_keeps_the_fewest_tokens_that_reach_p(logits, p):
    full = logits.softmax(-1)[0]
    kept = ~keep_top_p(logits, p)[0].isinf()
    assert kept[full.argmax()]
    assert full[kept].sum() >= p - 1e-5  # the kept tokens reach p,
    assert full[kept].sum() - full[kept].min() < p + 1e-5  # and without the least likely of them, they do not
    if not kept.all():
        assert full[kept].min() >= full[~kept].max()  # no more likely token was dropped


@given(rows, st.floats(0.0, 1.0))
def test_min_p_keeps_tokens_above_a_fraction_of_the_top_probability(logits, p):
    full = logits.softmax(-1)
    kept = ~keep_min_p(logits, p).isinf()
    assert torch.equal(kept, full >= p * full.max())
    assert kept.any()


@given(rows, st.integers(1, 12), st.floats(0.1, 1), st.floats(0, 1), st.floats(0.1, 4))
def test_filters_apply_in_order_and_give_a_distribution(logits, top_k, top_p, min_p, temperature):
    actual = probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = keep_min_p(keep_top_p(keep_top_k(logits / temperature, top_k), top_p), min_p).softmax(-1)
    assert torch.equal(actual, expected)
    assert actual.sum().item() == pytest.approx(1, abs=1e-5)


def test_filters_treat_rows_independently():
    logits = torch.tensor([[4.0, 0.0, 0.0, 0.0], [0.0, 3.9, 4.0, -9.0]])
    assert probabilities(logits, top_p=0.6).gt(0).tolist() == [[True, False, False, False], [False, True, True, False]]
    assert probabilities(logits, min_p=0.5).gt(0).tolist() == [[True, False, False, False], [False, True, True, False]]


def test_sampled_tokens_follow_the_probabilities():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(4000, 4)
    sampling = Sampling(temperature=1.3, top_k=3)
    drawn = sampling.draw(logits, torch.Generator().manual_seed(0)).bincount(minlength=4) / 4000
    assert_near(drawn, sampling.probabilities(logits[:1])[0], 0.03)
    assert drawn[3] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_sampled_in_single_precision(dtype):
    logits = (torch.randn(2, 50) * 4).to(dtype)
    assert probabilities(logits, top_p=0.9, min_p=0.01).dtype == torch.float32
    assert torch.equal(probabilities(logits), logits.float().softmax(-1))


@pytest.mark.parametrize("bad", [
    dict(temperature=-0.1), dict(temperature=float("nan")), dict(temperature=float("inf")),
    dict(top_k=0), dict(top_k=-3),
    dict(top_p=0.0), dict(top_p=1.1), dict(top_p=-1), dict(min_p=-0.1), dict(min_p=1.5), dict(top_k=2.5),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("call", ["generate", "stream"])
def test_invalid_sampling_options_are_refused_at_the_call(bad, call):
    name = next(iter(bad))
    with pytest.raises(ValueError, match=f"{name}="):
        getattr(MODELS["gqa"], call)(tokens(1, 3), 2, **bad)


# -- the decoding loop


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("n_loops", [1, 4, 6])
def test_greedy_decoding_takes_the_argmax_at_every_step(attn_type, n_loops):
    model, ids = MODELS[attn_type], tokens(2, 5)
    out = model.generate(ids, 8, n_loops=n_loops, temperature=0)
    assert torch.equal(out, uncached_greedy(model, ids, 8, n_loops))
    assert out.dtype == ids.dtype and torch.equal(out[:, :5], ids)


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_n_loops_defaults_to_max_loop_iters(attn_type):
    model, ids = MODELS[attn_type], tokens(2, 5)
    assert torch.equal(model.generate(ids, 4, temperature=0), uncached_greedy(model, ids, 4, model.cfg.max_loop_iters))


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_top_k_of_one_is_greedy(attn_type):
    model, ids = MODELS[attn_type], tokens(3, 4)
    greedy = model.generate(ids, 6, temperature=0)
    assert torch.equal(model.generate(ids, 6, top_k=1), greedy)
    assert torch.equal(model.generate(ids, 6, top_p=1e-6), greedy)
    assert torch.equal(model.generate(ids, 6, min_p=1.0), greedy)


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_a_left_padded_batch_generates_the_tokens_of_each_row_alone(attn_type):
    model, ids = MODELS[attn_type], tokens(3, 6)
    mask = left_padding([6, 3, 1], 6)
    together = model.generate(ids, 6, n_loops=5, temperature=0, attention_mask=mask)
    for row, real in enumerate(mask):
        alone = model.generate(ids[row : row + 1, real], 6, n_loops=5, temperature=0)
        assert torch.equal(together[row, 6:], alone[0, -6:])


def test_a_right_padded_prompt_is_refused():
    """The logits in the last column would be those of padding."""
    with pytest.raises(ValueError, match=r"attention_mask.*left"):
        MODELS["gqa"].generate(tokens(2, 4), 2, attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))


def test_a_seed_reproduces_generation():
    model, ids = MODELS["mla"], tokens(2, 4)

    def drawn(seed: int) -> Tensor:
        return model.generate(ids, 12, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    torch.manual_seed(5)
    by_global_seed = model.generate(ids, 12)
    torch.manual_seed(5)
    assert torch.equal(model.generate(ids, 12), by_global_seed)


def test_a_generator_leaves_the_global_random_state_unchanged():
    before = torch.get_rng_state()
    MODELS["gqa"].generate(tokens(1, 3), 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_a_row_is_filled_with_eos_after_its_first(attn_type):
    model, ids = MODELS[attn_type], tokens(4, 5)
    free = model.generate(ids, 8, temperature=0)
    eos = int(free[0, 6])
    out = model.generate(ids, 8, temperature=0, eos_token_id=eos)
    assert out.shape == free.shape
    for row, expected in zip(out[:, 5:].tolist(), free[:, 5:].tolist(), strict=True):
        n = expected.index(eos) + 1 if eos in expected else 8
        assert row == expected[:n] + [eos] * (8 - n)


def test_generation_ends_when_every_row_has_produced_eos():
    model, ids = MODELS["gqa"], tokens(1, 5)
    eos = int(model.generate(ids, 3, temperature=0)[0, 6])
    first = model.generate(ids, 8, temperature=0)[0, 5:].tolist().index(eos) + 1
    assert len(list(model.stream(ids, 8, temperature=0, eos_token_id=eos))) == first
    assert model.generate(ids, 8, temperature=0, eos_token_id=eos).shape == (1, 13)


def test_eos_in_the_prompt_does_not_end_generation():
    model, ids = MODELS["gqa"], tokens(1, 5)
    free = model.generate(ids, 3, temperature=0)
    unseen = next(t for t in ids[0].tolist() if t not in free[0, 5:].tolist())
    assert torch.equal(model.generate(ids, 3, temperature=0, eos_token_id=unseen), free)


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_stream_yields_the_tokens_that_generate_returns(attn_type):
    model, ids = MODELS[attn_type], tokens(3, 4)
    options = dict(n_loops=3, temperature=0.8, top_k=5)
    whole = model.generate(ids, 7, generator=torch.Generator().manual_seed(3), **options)
    parts = list(model.stream(ids, 7, generator=torch.Generator().manual_seed(3), **options))
    assert all(part.shape == (3,) for part in parts)
    assert torch.equal(torch.stack(parts, 1), whole[:, 4:])


def test_stream_computes_each_token_lazily():
    model, calls = tiny_model(), []
    original = model.recurrent.forward
    model.recurrent.forward = lambda *args, **named: calls.append(args[0].shape[1]) or original(*args, **named)
    tokens_made = model.stream(tokens(1, 5), 4)
    assert calls == []
    next(tokens_made)
    assert calls == [5]
    next(tokens_made)
    assert calls == [5, 1]


def test_zero_new_tokens_return_the_prompt():
    ids = tokens(2, 4)
    assert torch.equal(MODELS["gqa"].generate(ids, 0), ids)


def modes(model: OpenMythos) -> list[bool]:
    return [module.training for module in model.modules()]


def test_generation_computes_as_in_eval_mode_without_changing_modes():
    model = tiny_model(dropout=0.5).train()
    model.prelude[0].eval()
    before, seen = modes(model), []
    original = model.recurrent.forward
    model.recurrent.forward = lambda *args, **named: seen.append(modes(model)) or original(*args, **named)
    ids = tokens(1, 4)
    first = model.generate(ids, 3, temperature=0)
    assert seen == [before] * 3 and modes(model) == before  # other threads may rely on the modes
    assert torch.equal(model.generate(ids, 3, temperature=0), first)
    for _ in model.stream(ids, 3):
        assert modes(model) == before
    assert torch.equal(model.eval().generate(ids, 3, temperature=0), first)


def test_modes_are_unchanged_after_an_error():
    model = tiny_model().train()
    before = modes(model)

    def fail(*args, **named):
        raise RuntimeError("out of order")

    model.recurrent.forward = fail
    with pytest.raises(RuntimeError, match="out of order"):
        model.generate(tokens(1, 3), 2)
    assert modes(model) == before


def test_generation_records_no_gradient():
    model = tiny_model()
    assert not model.generate(tokens(1, 3), 2).requires_grad
    logits = model(tokens(1, 3), 2)
    model.generate(tokens(1, 3), 2)
    logits.sum().backward()  # generation in between leaves the autograd graph intact
    assert model.embed.weight.grad is not None


@pytest.mark.parametrize(
    "max_new_tokens, message", [(-1, "max_new_tokens=-1"), (40, "max_seq_len=32"), (2.5, "max_new_tokens=2.5")]
)
def test_invalid_max_new_tokens_are_refused(max_new_tokens, message):
    for call in ("generate", "stream"):
        with pytest.raises(ValueError, match=message):
            getattr(MODELS["gqa"], call)(tokens(1, 4), max_new_tokens)


def test_more_than_max_output_tokens_are_refused():
    model = tiny_model(max_output_tokens=3)
    assert model.generate(tokens(1, 4), 3).shape == (1, 7)
    with pytest.raises(ValueError, match="max_output_tokens=3"):
        model.generate(tokens(1, 4), 4)


@pytest.mark.parametrize(
    "input_ids", [tokens(4), torch.zeros(1, 0, dtype=torch.long), [[1, 2]]], ids=["flat", "empty", "list"]
)
def test_invalid_prompts_are_refused(input_ids):
    with pytest.raises(ValueError, match="input_ids"):
        MODELS["gqa"].generate(input_ids, 2)


def test_an_attention_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="attention_mask"):
        MODELS["gqa"].generate(tokens(1, 4), 2, attention_mask=torch.ones(1, 3))


# -- warm starts


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("exit", [None, StateChange(0.5)], ids=str)
def test_a_warm_start_is_the_last_state_of_the_previous_token(attn_type, exit):
    model, ids, mask = tiny_model(attn_type, state_init="noise"), tokens(2, 5), left_padding([5, 3], 5)
    made, new, first, cache, valid, generator = [], ids, None, KVCache(), mask, torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(10):
            h, ctx = model.states(new, 3, cache, attention_mask=valid, exit=exit, first=first)
            logits = model.head(model.decode(h, ctx))[:, -1]
            new = Sampling(top_k=None).draw(logits, generator).unsqueeze(1)
            made.append(new)
            first, valid = h[:, -1:], None

    def generated(**changes) -> Tensor:
        options = dict(n_loops=3, top_k=None, attention_mask=mask, exit=exit, warm_start=True) | changes
        streamed = torch.stack(list(model.stream(ids, 10, generator=torch.Generator().manual_seed(0), **options)), 1)
        whole = model.generate(ids, 10, generator=torch.Generator().manual_seed(0), **options)
        assert torch.equal(whole[:, 5:], streamed)
        return streamed

    assert torch.equal(generated(), torch.cat(made, 1))
    assert not torch.equal(generated(), generated(warm_start=False))


def test_a_warm_start_requires_noise_as_state_init_and_no_draft():
    for state_init in ("input", "zero"):
        with pytest.raises(ValueError, match=f"state_init='{state_init}'.*'noise'"):
            tiny_model(state_init=state_init).generate(tokens(1, 3), 2, warm_start=True)
    with pytest.raises(ValueError, match="draft_loops=1"):
        tiny_model(state_init="noise", halting=False).generate(tokens(1, 3), 2, warm_start=True, draft_loops=1)


@pytest.mark.parametrize("changes", [dict(halting=True), dict(halting=False, state_noise=0.5)], ids=str)
def test_a_part_of_the_model_in_training_mode_computes_as_in_eval_mode(changes):
    model, ids = tiny_model(**changes), tokens(1, 5)
    expected = model.generate(ids, 4, 3, temperature=0, engine="modules")
    model.recurrent.train()
    assert torch.equal(model.generate(ids, 4, 3, temperature=0, engine="modules"), expected)
    assert model.recurrent.training and not model.training


@pytest.mark.parametrize("mask, message", [
    ([-3, -1, 1, 1, 1], "holds values other than 0"),
    ([1, 1, 2, 2, 2], "numbers several documents, but a prompt is one document"),
    ([0, 0, 0, 0, 0], "has a row that is all padding; leave such prompts out"),
    ([1, 1, 1, 1, 0], "has padding after tokens"),
], ids=str)  # fmt: skip
def test_invalid_masks_are_refused_at_the_call(mask, message):
    for call in (MODELS["gqa"].stream, MODELS["gqa"].generate):
        with pytest.raises(ValueError, match=message):
            call(tokens(1, 5), 3, 2, attention_mask=torch.tensor([mask]))


def test_the_smallest_temperature_takes_the_most_likely_token():
    logits = torch.randn(3, 40)
    for temperature in (1e-30, 1e-39, 5e-324):
        assert torch.equal(Sampling(temperature).draw(logits), logits.argmax(-1))


def test_top_p_of_1_keeps_every_token():
    logits = torch.randn(1, 150_000) * 3
    assert torch.equal(keep_top_p(logits, 1.0), logits)
