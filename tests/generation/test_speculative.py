"""Speculative decoding changes how fast tokens are generated, not which, nor their distribution."""

import itertools
import math

import pytest
import torch
from helpers import ATTENTION, assert_near, left_padding, tiny_model, tokens
from torch import Tensor

from open_mythos import OpenMythos
from open_mythos.generation.engine import Depth, Engine
from open_mythos.generation.engines import make_engine
from open_mythos.generation.sampling import Sampling
from open_mythos.generation.speculative import Draft, accept, drafted
from open_mythos.nn.exits import StateChange

MODELS = {attn_type: tiny_model(attn_type, halting=False) for attn_type in ATTENTION}


def chi_square_is_likely(counts: Tensor, expected: Tensor) -> bool:
    """Whether counts lie within four standard deviations of a chi-square's mean; rare cells are pooled."""
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]]).double()
    statistic = ((counts - expected).square() / expected.clamp(min=1e-9))[expected > 0].sum()
    freedom = int((expected > 0).sum()) - 1
    return float(statistic) < freedom + 4 * math.sqrt(2 * freedom)


@torch.no_grad()
def joint(model: OpenMythos, prompt: Tensor, n_new: int, n_loops: int, sampling: Sampling) -> Tensor:
    """Exact probabilities of every continuation of ``prompt`` (T,) by ``n_new`` tokens: (vocab ** n_new,)."""
    V = model.cfg.vocab_size
    tails = torch.tensor(list(itertools.product(range(V), repeat=n_new)))
    ids = torch.cat([prompt.expand(len(tails), -1), tails], 1)
    p = sampling.probabilities(model(ids, n_loops)[:, len(prompt) - 1 : -1])
    return p.gather(-1, tails.unsqueeze(-1)).squeeze(-1).prod(1)


def blocks(
    model: OpenMythos, ids: Tensor, n_new: int, n_loops: int, draft: Draft, sampling: Sampling,
    mask: Tensor | None = None, generator: torch.Generator | None = None,
) -> tuple[list[Tensor], Engine]:  # fmt: skip
    """The accepted tokens of each round, and the engine that computed them."""
    engine = make_engine("modules", model, Depth(n_loops), drafts=True)
    logits = engine.extend(ids, mask)
    return list(drafted(model, engine, logits, draft, sampling, (), generator, n_new)), engine


# -- greedy


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("draft_loops, n_loops", [(1, 2), (1, 4), (2, 5), (4, 6)])
@pytest.mark.parametrize("draft_tokens", [1, 2, 5, 30])
def test_greedy_tokens_equal_those_without_a_draft(attn_type, draft_loops, n_loops, draft_tokens):
    for seed, lengths in enumerate(([6], [6, 3, 1], [4, 6])):
        model, ids = tiny_model(attn_type, halting=False, seed=seed), tokens(len(lengths), 6, seed=seed)
        mask = left_padding(lengths, 6) if seed else None
        options = dict(max_new_tokens=20, n_loops=n_loops, temperature=0, attention_mask=mask)
        drafted = model.generate(ids, draft_loops=draft_loops, draft_tokens=draft_tokens, **options)
        assert torch.equal(drafted, model.generate(ids, **options))


@pytest.mark.parametrize("changes", [
    dict(prelude_layers=0, coda_layers=0), dict(prelude_layers=2, coda_layers=2), dict(conv_taps=0, local_window=0),
    dict(state_init="noise"), dict(lora_rank=0, loop_index_dim=8),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_every_model_option_gives_the_greedy_tokens_without_a_draft(attn_type, changes):
    model, ids = tiny_model(attn_type, halting=False, **changes), tokens(2, 5)
    options = dict(max_new_tokens=16, n_loops=5, temperature=0)
    assert torch.equal(model.generate(ids, draft_loops=2, draft_tokens=3, **options), model.generate(ids, **options))


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_drafts_of_the_tested_models_are_often_accepted_and_often_rejected(attn_type):
    """Otherwise the tests above would show nothing."""
    sizes = []
    for seed in range(6):
        model = tiny_model(attn_type, halting=False, seed=seed)
        found, _ = blocks(model, tokens(1, 5, seed=seed), 24, 5, Draft(1, 3), Sampling(0))
        sizes += [block.shape[1] for block in found][1:-1]
    assert {1, 4} <= set(sizes)


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_eos_ends_generation_as_without_a_draft(attn_type):
    model, ids = MODELS[attn_type], tokens(3, 5)
    free = model.generate(ids, 20, n_loops=4, temperature=0)
    for eos in {int(free[row, at]) for row in range(3) for at in (5, 7, 12)}:
        options = dict(max_new_tokens=20, n_loops=4, temperature=0, eos_token_id=eos)
        plain = list(model.stream(ids, **options))
        drafted = list(model.stream(ids, draft_loops=2, draft_tokens=4, **options))
        assert torch.equal(torch.stack(drafted), torch.stack(plain))
        assert torch.equal(model.generate(ids, draft_loops=2, **options), model.generate(ids, **options))


@pytest.mark.parametrize("max_new_tokens", [0, 1, 2, 28])
def test_drafting_generates_exactly_max_new_tokens(max_new_tokens):
    model, ids = MODELS["gqa"], tokens(2, 5)
    assert model.cfg.max_seq_len == 32
    out = model.generate(ids, max_new_tokens, n_loops=4, draft_loops=1, draft_tokens=9)
    assert out.shape == (2, 5 + max_new_tokens)


# -- sampled


@pytest.mark.parametrize("attn_type, n_loops, draft_loops", [("gqa", 4, 1), ("mla", 6, 2)])
def test_sampled_tokens_have_the_distribution_of_full_depth(attn_type, n_loops, draft_loops):
    """Four tokens, jointly, of both rows of a padded batch, eight times each, against all possible continuations."""
    model = tiny_model(attn_type, halting=False, vocab_size=4)
    ids, mask = tokens(2, 4, high=4), left_padding([4, 2], 4)
    sampling, n, times = Sampling(temperature=0.6, top_k=3), 400, 8
    expected = [joint(model, row[real], 4, n_loops, sampling) for row, real in zip(ids, mask, strict=True)]
    draft = joint(model, ids[0], 4, draft_loops, sampling)
    assert (draft - expected[0]).abs().sum() / 2 > 0.1, "the draft's distribution is too close to the model's"
    counts, generator = torch.zeros(2, 256), torch.Generator().manual_seed(1)
    many, real, which = ids.repeat(times, 1), mask.repeat(times, 1), torch.arange(2).repeat(times)
    for _ in range(n // times):
        new = torch.cat(blocks(model, many, 4, n_loops, Draft(draft_loops, 2), sampling, real, generator)[0], 1)
        counts.index_put_((which, new @ torch.tensor([64, 16, 4, 1])), torch.ones(2 * times), accumulate=True)
    for found, exact in zip(counts, expected, strict=True):
        assert chi_square_is_likely(found, n * exact)
        assert found[exact == 0].sum() == 0  # tokens outside of top-k are never sampled


@pytest.mark.parametrize("n_rows", [1, 3])
def test_accepted_tokens_follow_the_target_distribution(n_rows):
    """In every row, both accepted tokens and those sampled after a rejection; with tables in place of models."""
    V, K, n = 3, 2, 3000
    p, other = torch.rand(2, K + 1, V, V, generator=torch.Generator().manual_seed(0)).log().mul(2).softmax(-1)
    q = (p + other) / 2  # (place, previous token, token)
    generator = torch.Generator().manual_seed(1)

    def after(place: int, before: Tensor, table: Tensor) -> Tensor:
        return torch.multinomial(table[place, before], 1, generator=generator).squeeze(1)

    counts, lengths = torch.zeros(n_rows, V**3), set()
    for _ in range(n):
        drafted = [torch.zeros(n_rows, dtype=torch.long)]
        for place in range(K):
            drafted.append(after(place, drafted[-1], q))
        y = torch.stack(drafted, 1)
        of = torch.arange(K + 1)
        new = accept(p[of, y], q[of[:K], y[:, :K]], y[:, 1:], torch.zeros(n_rows, K, dtype=torch.bool), generator)
        lengths.add(new.shape[1])
        while new.shape[1] < 3:
            new = torch.cat([new, after(new.shape[1], new[:, -1], p).unsqueeze(1)], 1)
        counts[torch.arange(n_rows), new @ torch.tensor([9, 3, 1])] += 1
    assert lengths == {1, 2, 3}
    exact = (p[0, 0, :, None, None] * p[1, :, :, None] * p[2, None]).flatten()
    for found in counts:
        assert chi_square_is_likely(found, n * exact)


def test_tokens_after_the_end_of_a_row_are_always_accepted():
    p, q = torch.zeros(2, 3, 4), torch.zeros(2, 2, 4)
    p[:, :, 1], q[:, :, 2] = 1, 1
    y = torch.full((2, 2), 2)
    assert accept(p, q, y, torch.zeros(2, 2, dtype=torch.bool)).tolist() == [[1], [1]]
    assert accept(p, q, y, torch.tensor([[True, True], [True, False]])).tolist() == [[2, 2], [2, 1]]


def test_a_draft_from_the_target_distribution_is_never_rejected():
    p = torch.rand(4, 6, 9).softmax(-1)
    y = torch.multinomial(p[:, :5].flatten(0, 1), 1).view(4, 5)
    for _ in range(20):
        assert torch.equal(accept(p, p[:, :5], y, torch.zeros(4, 5, dtype=torch.bool))[:, :5], y)


def test_a_seed_reproduces_drafting_without_changing_the_global_random_state():
    model, ids, before = MODELS["mla"], tokens(2, 4), torch.get_rng_state()
    first, again, other = (
        model.generate(ids, 12, draft_loops=1, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


# -- cost


@pytest.mark.parametrize("draft_loops", [1, 3])
def test_no_loop_of_a_token_is_computed_twice(draft_loops):
    model, computed = tiny_model(halting=False), []
    original = model.recurrent.step
    model.recurrent.step = lambda h, *args: computed.append(h.shape[1]) or original(h, *args)
    found, _ = blocks(model, tokens(1, 4), 25, 5, Draft(draft_loops, 3), Sampling(0))
    # The prompt, and then in each round its drafts and the token before them.
    of_rounds, made = [], 1
    for block in found[1:]:
        of_rounds.append(min(3, 25 - made - 1))
        made += block.shape[1]
    assert sum(computed) == 5 * (4 + sum(of_rounds) + len(of_rounds))
    assert len(computed) == 5 + sum((n + 1) * draft_loops + 5 - draft_loops for n in of_rounds)


def test_rejected_tokens_are_removed_from_the_cache():
    model, ids = MODELS["gqa"], tokens(2, 5)
    found, engine = blocks(model, ids, 12, 4, Draft(1, 3), Sampling(0))
    new, cache = torch.cat(found, 1), engine.cache
    assert set(cache.lengths().values()) == {cache.length} and cache.length == 5 + 12 - 1
    with torch.no_grad():
        expected = model(torch.cat([ids, new], 1), 4)[:, -1:]
        assert_near(model(new[:, -1:], 4, cache), expected)


def test_drafting_leaves_module_modes_unchanged():
    model = tiny_model(halting=False).train()
    for _ in model.stream(tokens(1, 3), 6, draft_loops=1):
        assert all(module.training for module in model.modules())


# -- what is refused


@pytest.mark.parametrize("options, message", [
    (dict(draft_loops=4), r"draft_loops=4.*n_loops=4"), (dict(draft_loops=0), "draft_loops=0"),
    (dict(draft_loops=1.5), r"draft_loops=1\.5"), (dict(draft_loops=1, draft_tokens=0), "draft_tokens=0"),
    (dict(draft_loops=1, exit=StateChange()), "StateChange.*leave out"),
    (dict(draft_loops=1, cache_loops=2), "cache_loops=2 keeps those of 2 of 4"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("call", ["generate", "stream"])
def test_invalid_draft_options_are_refused_at_the_call(options, message, call):
    with pytest.raises(ValueError, match=message):
        getattr(MODELS["gqa"], call)(tokens(1, 3), 2, n_loops=4, **options)


def test_drafting_with_a_halting_gate_is_refused():
    with pytest.raises(ValueError, match=r"Gate.*cfg\.halting=False"):
        tiny_model(halting=True).generate(tokens(1, 3), 2, draft_loops=1)


def test_drafting_works_with_compiled_blocks():
    model, ids = tiny_model(halting=False), tokens(2, 5)
    expected = model.generate(ids, 6, n_loops=4, temperature=0)
    for layer in model.recurrent.layers:
        layer.compile(backend="eager")
    found = model.generate(ids, 6, n_loops=4, temperature=0, draft=Draft(2, 3), engine="modules")
    assert torch.equal(found, expected)
