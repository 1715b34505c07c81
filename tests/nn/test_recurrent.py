"""The recurrent loop: positions stop where the gate halts them, and are not computed from then on."""

from itertools import pairwise

import pytest
import torch
from helpers import ATTENTION, assert_near, left_padding, loops_used, tiny_model, tokens
from plain_halting import halting

from open_mythos import KVCache, OpenMythos
from open_mythos.context import Context
from open_mythos.nn import recurrent as recurrent_module
from open_mythos.nn.active import ActiveTokens
from open_mythos.nn.exits import PredictionKL, StateChange
from open_mythos.ops.attention import AttentionMask
from open_mythos.ops.rope import precompute_rope_freqs, rope_table


def set_gate(model: OpenMythos, probability: float) -> None:
    """Make the gate return ``probability`` for every state."""
    model.recurrent.act.forward = lambda h: h.new_full(h.shape[:2], probability)


@pytest.fixture
def ffn_tokens(monkeypatch):
    """A list that collects how many tokens each call of a model's expert layer gets."""

    def watch(model: OpenMythos) -> list[int]:
        seen: list[int] = []
        original = model.recurrent.block.ffn.forward

        def forward(x):
            seen.append(x.shape[:-1].numel())
            return original(x)

        monkeypatch.setattr(model.recurrent.block.ffn, "forward", forward)
        return seen

    return watch


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("padded", [False, True])
def test_halted_positions_are_not_computed(attn_type, padded, ffn_tokens):
    model, ids = tiny_model(attn_type), tokens(3, 8)
    inputs = dict(attention_mask=left_padding([8, 5, 2], 8)) if padded else {}
    used = loops_used(model, ids, 6, **inputs)
    seen = ffn_tokens(model)
    with torch.no_grad():
        model(ids, 6, **inputs)
    assert seen[0] <= ids.numel()  # the first loop may run padding too
    assert seen[1:] == [int(used.ge(loop).sum()) for loop in range(2, int(used.max()) + 1)]
    assert sum(seen) < 6 * ids.numel() and len(set(seen)) > 2
    if padded:
        assert used[~inputs["attention_mask"]].eq(0).all()


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("probability, loops", [(1.0, 1), (0.9, 1), (0.5, 2), (0.25, 4), (0.0, 7)])
def test_a_constant_gate_halts_all_positions_at_the_same_loop(attn_type, probability, loops, ffn_tokens):
    model, ids = tiny_model(attn_type, act_threshold=0.9), tokens(2, 5)
    set_gate(model, probability)
    seen = ffn_tokens(model)
    with torch.no_grad():
        halted = model(ids, 7)
        assert seen == [10] * loops
        model.cfg.halting = False
        assert_near(halted, model(ids, loops), 0.0)


@pytest.mark.parametrize("setting", ["off", "training"])
def test_all_loops_run_with_halting_off_and_in_training(setting, ffn_tokens):
    model, ids = tiny_model(halting=setting != "off").train(setting == "training"), tokens(2, 5)
    set_gate(model, 1.0)
    seen = ffn_tokens(model)
    with torch.no_grad():  # with gradients, training mode also trains the gate, in separate loops
        model(ids, 6)
    assert seen == [10] * 6


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("halting", [False, True])
def test_a_replaced_gate_is_called_once_per_loop_with_all_states(attn_type, halting):
    model, ids = tiny_model(attn_type, gate_bias=-20.0, halting=halting), tokens(2, 5)
    original, calls = model.recurrent.act.forward, []

    def traced(h):
        p = original(h)
        calls.append(p.detach())
        assert h.shape == (2, 5, 32) and p.shape == (2, 5)
        return p

    model.recurrent.act.forward = traced
    model(ids, 6)
    assert len(calls) == 6


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_wrapping_the_forward_of_the_gate_does_not_change_halting(attn_type):
    """A replacement of ``forward`` that passes the states on gets the gate's probabilities for their change."""
    model, ids, seen = tiny_model(attn_type), tokens(2, 8), []
    with torch.no_grad():
        model.recurrent.act.motion.mul_(10)
        expected, used = model(ids, 12), loops_used(model, ids, 12)
        original = model.recurrent.act.forward
        model.recurrent.act.forward = lambda h: seen.append(original(h)) or seen[-1]
        assert_near(model(ids, 12), expected)
    reached = torch.stack(seen).cumsum(0) >= model.cfg.act_threshold
    assert torch.equal(torch.where(reached.any(0), reached.int().argmax(0) + 1, 12), used)
    assert used.min() < used.max()
    assert original(torch.ones(1, 3, 32)).shape == (1, 3), "called directly, the gate needs no change of the states"


def test_a_replaced_gate_decides_when_positions_halt():
    model, ids = tiny_model(act_threshold=0.99), tokens(1, 6)
    model.recurrent.act.forward = lambda h: torch.tensor([[1.0, 0.5, 0.34, 0.25, 0.2, 0.0]])
    assert loops_used(model, ids, 8).tolist() == [[1, 2, 3, 4, 5, 8]]


@pytest.mark.parametrize("training", [False, True])
def test_a_replaced_feed_forward_is_used(training):
    model, ids = tiny_model(gate_bias=-20.0).train(training), tokens(2, 5)
    calls = []
    model.recurrent.block.ffn.forward = lambda x: calls.append(1) or torch.zeros_like(x)
    with torch.no_grad():
        silent = model(ids, 4)
    assert len(calls) == 4
    del model.recurrent.block.ffn.forward
    model.recurrent.block.ffn.gate_up.data.zero_()
    model.recurrent.block.ffn.shared.down.weight.data.zero_()
    with torch.no_grad():
        assert_near(silent, model(ids, 4))


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_output_is_the_state_at_the_loop_where_a_position_halted(attn_type):
    model, ids = tiny_model(attn_type), tokens(2, 8)
    with torch.no_grad():
        e, ctx = model.encode(ids)
        states = list(model.recurrent.iterate(e, e, ctx, 6))
        out = model.recurrent(e, e, ctx, n_loops=6)
    h, p = torch.stack([s.h for s in states]), torch.stack([s.halting for s in states])
    expected, _, used = halting(h, p, model.cfg.act_threshold)
    assert len(used.unique()) > 1
    assert torch.equal(out, expected)
    assert torch.equal(torch.stack([s.ran.long() for s in states]).sum(0), used)
    for before, after in pairwise(states):
        assert torch.equal(after.h[~after.ran], before.h[~after.ran])


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_iterate_numbers_its_loops_and_may_end_early(attn_type):
    model, ids = tiny_model(attn_type), tokens(1, 4)
    set_gate(model, 0.3)
    with torch.no_grad():
        states = [state for state, _ in model.iterate(ids, 9)]
    assert [state.loop for state in states] == [0, 1, 2]


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("training", [False, True])
def test_the_recurrent_block_can_be_called_with_a_rotary_table(attn_type, training):
    """As in the reference implementation: a table of all positions, no mask object."""
    model = tiny_model(attn_type).train(training)
    e = torch.randn(2, 6, 32)
    table = precompute_rope_freqs(model.cfg.rope_dim, 32, model.cfg.rope_theta)
    with torch.no_grad():
        out = model.recurrent(e, e, table, None, 4)
        assert_near(
            out, model.recurrent(e, e, rope_table(torch.arange(6), model.cfg.rope_dim, model.cfg.rope_theta), None, 4)
        )
        for cache in (KVCache(), {}):
            parts = [model.recurrent(x, x, table, None, 4, cache) for x in (e[:, :4], e[:, 4:5], e[:, 5:])]
            assert_near(torch.cat(parts, 1), out)


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_a_transformer_block_can_be_called_by_itself(attn_type):
    block = tiny_model(attn_type).recurrent.block
    cfg = tiny_model(attn_type).cfg
    x, table = torch.randn(2, 6, 32), precompute_rope_freqs(cfg.rope_dim, 32, cfg.rope_theta)
    with torch.no_grad():
        whole = block(x, table)
        for cache in (KVCache(), {}):
            parts = [block(x[:, i : i + 2], table, None, cache, "slot") for i in (0, 2, 4)]
            assert_near(torch.cat(parts, 1), whole)
    with pytest.raises(
        ValueError, match=r"mask is \(5, 5\); pass a bool or additive mask whose shape ends in \(6, 6\)"
    ):
        block(x, table, torch.ones(5, 5))


@torch.no_grad()
@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("kind", ["bool", "added", "for each row"])
def test_a_block_accepts_a_mask_made_by_the_caller(attn_type, kind):
    """In one call, and in loops in which positions halt and are packed, or all run."""
    model = tiny_model(attn_type, conv_taps=0)
    e, (cfg, core) = torch.randn(2, 6, 32), (model.cfg, model.recurrent)
    table = precompute_rope_freqs(cfg.rope_dim, 6, cfg.rope_theta)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    if kind == "added":
        mask = torch.zeros(1, 1, 6, 6).masked_fill(~mask, float("-inf"))
    elif kind == "for each row":
        mask = mask.expand(2, 1, 6, 6)
    assert_near(core.block(e, table, mask), core.block(e, table))
    assert len({int(state.ran.sum()) for state in core.iterate(e, e, context(e, table), 5)}) > 2
    assert_near(core(e, e, table, mask, 5), core(e, e, table, None, 5))


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_a_given_mask_for_each_row_works_in_training(attn_type):
    core = tiny_model(attn_type, warm_start=True).recurrent.train()
    e = torch.randn(8, 6, 32, requires_grad=True)
    table = precompute_rope_freqs(core.layers[0].attn.rope_dim if attn_type == "mla" else 8, 6)
    mask = torch.ones(8, 1, 6, 6, dtype=torch.bool).tril()
    assert_near(core(e, e, table, mask, 3), core(e, e, table, None, 3))
    core(e, e, table, mask, 3).square().mean().backward()


@torch.no_grad()
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_a_given_mask_can_hide_a_token(attn_type):
    block, cfg = tiny_model(attn_type, conv_taps=0, local_window=0).recurrent.block, tiny_model(attn_type).cfg
    x, table = torch.randn(1, 5, 32), precompute_rope_freqs(cfg.rope_dim, 5, cfg.rope_theta)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    mask[3:, 1] = False
    changed = x.clone()
    changed[:, 1] += 1
    before, after = block(x, table, mask), block(changed, table, mask)
    assert_near(after[:, 3:], before[:, 3:], 1e-6)
    assert (after[:, 2] - before[:, 2]).abs().max() > 1e-3


def context(x: torch.Tensor, table: torch.Tensor) -> Context:
    return Context(table, AttentionMask(x.shape[1], x.shape[1]))


def test_a_loop_index_embedding_changes_the_output():
    plain, coded = tiny_model(loop_index_dim=0), tiny_model(loop_index_dim=8)
    with torch.no_grad():
        assert not torch.equal(plain(tokens(1, 4), 2), coded(tokens(1, 4), 2))
        assert coded(tokens(1, 4), 60).isfinite().all()


@pytest.mark.parametrize("stay", [False, True])
def test_scatter_and_unpack_invert_gather_and_pack(stay, monkeypatch):
    monkeypatch.setattr("open_mythos.nn.active.STAY", 2 if stay else 1)
    running = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]]).bool()
    active, x = ActiveTokens(running, packs=True), torch.randn(3, 4, 5)
    assert len(active) == 4 and active.width == 3 and active.is_packed
    gathered = active.gather(x)
    assert gathered.shape == (1, 4, 5) and torch.equal(gathered[0], x[running])
    assert torch.equal(active.scatter(gathered, into=x), x)
    assert torch.equal(active.scatter(gathered + 1, into=x), x + running[..., None])
    packed = active.pack(gathered)
    assert active.queries_stay == stay and torch.equal(active.unpack(packed), gathered)
    if stay:
        assert torch.equal(packed, x * running[..., None])
    else:
        assert packed.shape == (3, 3, 5) and packed[1].eq(0).all() and packed[2, 1:].eq(0).all()


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
@pytest.mark.parametrize("changes", [{}, dict(local_share=1.0), dict(local_window=0), dict(causal=False)], ids=str)
def test_queries_left_in_place_give_the_results_of_packed_ones(attn_type, changes, monkeypatch):
    model, ids = tiny_model(attn_type, max_seq_len=80, **changes), tokens(3, 80)  # attention takes several calls
    valid = torch.ones(3, 80, dtype=torch.long)
    valid[1, :7] = 0
    found, halts = list[torch.Tensor](), False
    for stay in (0, 80):
        monkeypatch.setattr("open_mythos.nn.active.STAY", stay)
        with torch.no_grad():
            found += [model(ids, 6, exit=StateChange(0.3)), model(ids, 6, exit=StateChange(0.3), attention_mask=valid)]
            halts = halts or not torch.equal(found[-2], model(ids, 6, exit=StateChange(1e-9)))
    assert halts
    assert_near(found[0], found[2])
    assert_near(found[1][valid > 0], found[3][valid > 0])


def test_active_tokens_return_their_input_while_all_positions_run():
    active, x = ActiveTokens(torch.ones(2, 3, dtype=torch.bool), packs=True), torch.randn(2, 3, 5)
    assert active.gather(x) is active.pack(x) is active.unpack(x) is active.scatter(x, into=x) is x


def test_halted_positions_keep_their_last_keys_and_values():
    """Raw rows and final ones, whatever a convolution would compute from the new rows of their neighbours."""
    all_run, some = torch.ones(1, 3, dtype=torch.bool), torch.tensor([[True, False, True]])
    first, second, final = torch.randn(1, 3, 2), torch.randn(1, 3, 2), torch.randn(1, 3, 2)
    for packs in (True, False):
        active = ActiveTokens(all_run, packs)
        assert active.merge_raw("layer", first) is first
        active.merge("layer", first, 10 * first)
        active = active.only(some)
        raw = active.merge_raw("layer", active.gather(second))
        assert torch.equal(raw, torch.stack([second[0, 0], first[0, 1], second[0, 2]]).unsqueeze(0))
        rows = active.merge("layer", raw, final)
        assert torch.equal(rows, torch.stack([final[0, 0], 10 * first[0, 1], final[0, 2]]).unsqueeze(0))


@torch.no_grad()
@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("exit", [None, StateChange(0.06), PredictionKL(5e-3)], ids=str)
def test_fixed_shapes_give_the_results_of_packed_positions(attn_type, cached, exit, monkeypatch):
    """As used on a GPU, where packing would have to wait for the number of positions that still run."""
    model, ids, mask = tiny_model(attn_type, core_layers=2), tokens(3, 9), left_padding([9, 6, 2], 9)

    def run() -> torch.Tensor:
        if not cached:
            return model(ids, 6, attention_mask=mask, exit=exit)
        cache = KVCache()
        parts = zip(ids.split([5, 1, 3], 1), mask.split([5, 1, 3], 1), strict=True)
        return torch.cat([model(part, 6, cache, attention_mask=real, exit=exit) for part, real in parts], 1)

    assert len(loops_used(model, ids, 6, attention_mask=mask, exit=exit)[mask].unique()) > 1
    packed = run()
    monkeypatch.setattr(recurrent_module, "shapes_follow_values", lambda x: False)
    shapes = []
    model.recurrent.block[0].ffn.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[:2])))
    assert_near(run()[mask], packed[mask])
    assert set(shapes) == ({(3, 5), (3, 1), (3, 3)} if cached else {(3, 9)})


@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("first_loop", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_iterate_can_continue_from_a_later_first_loop(attn_type, first_loop, padded):
    """The first loops run one token at a time and fill the cache; the other loops run for all tokens at once."""
    model, ids = tiny_model(attn_type, halting=False, state_init="zero"), tokens(2, 6)
    mask = left_padding([6, 4], 6) if padded else None
    cache = KVCache()
    with torch.no_grad():
        whole = model.states(ids, 5, attention_mask=mask)[0]
        now = None if mask is None else mask[:, :3]
        model(ids[:, :3], 5, cache, attention_mask=now)
        states = [model.states(ids[:, i : i + 1], first_loop, cache)[0] for i in range(3, 6)]
        e, ctx = model.encode(ids, attention_mask=mask)
        ctx = Context(ctx.rotary[..., 3:, :], AttentionMask(3, 6, mask), cache)
        for state in model.recurrent.iterate(torch.cat(states, 1), e[:, 3:], ctx, 5, first_loop=first_loop):
            h = state.h
    assert_near(h, whole[:, 3:])


def test_an_invalid_first_loop_is_refused():
    model, ids = tiny_model(halting=False), tokens(2, 5)
    e, ctx = model.encode(ids)
    for first_loop in (-1, 4):
        with pytest.raises(ValueError, match=f"first_loop={first_loop} of n_loops=4"):
            list(model.recurrent.iterate(e, e, ctx, 4, first_loop=first_loop))
    with pytest.raises(ValueError, match=r"StateChange.*first_loop=2"):
        list(model.recurrent.iterate(e, e, ctx, 4, exit=StateChange(), first_loop=2))
