"""Every engine gives the model's own logits, for every kind of model, and any calls, drafts and truncations."""

import pytest
import torch
from helpers import ATTENTION, assert_near, left_padding, loops_used

from open_mythos import KVCache, MythosConfig, OpenMythos
from open_mythos.generation import engines, graph
from open_mythos.generation.engine import Depth, ModuleEngine
from open_mythos.generation.engines import check_engine, make_engine
from open_mythos.generation.fused import FusedBlock, fuse, why_not_fused
from open_mythos.generation.graph import GraphEngine
from open_mythos.nn.exits import PredictionKL, StateChange

KINDS = {
    "gqa": dict(attn_type="gqa"),
    "mla": dict(attn_type="mla"),
    "gqa, no convolution, one expert": dict(attn_type="gqa", conv_taps=0, n_experts=1, n_experts_per_tok=1),
    "mla, all heads far, no shared expert": dict(attn_type="mla", local_window=0, n_shared_experts=0),
    "all heads local": dict(attn_type="gqa", local_share=1.0, n_shared_experts=0),
    "loop index and lora": dict(attn_type="mla", loop_index_dim=6, lora_rank=3, conv_taps=2),
    "stretched rotary": dict(attn_type="gqa", rope_factor=4.0, rope_context=20, rope_theta=100.0),
    "no input norm, a bridge": dict(attn_type="mla", input_norm=False, bridge_dim=12),
    "three dense blocks in the core": dict(
        attn_type="gqa", core_layers=3, n_experts=0, dense_dim=19, tied_head=False, norm_eps=1e-3
    ),
    "zero start, no state norm": dict(attn_type="gqa", state_init="zero", state_norm=False, prelude_layers=0),
}
# Graphs need CUDA; without one, GraphEngine computes the same over its cache of fixed size on any device.
FAST = {"fused": lambda *args: make_engine("fused", *args), "graph": GraphEngine}


def a_model(**changes) -> OpenMythos:
    torch.manual_seed(0)
    cfg = dict(
        vocab_size=40, dim=32, n_heads=4, n_kv_heads=2, max_seq_len=256, max_loop_iters=5, prelude_layers=1,
        coda_layers=2, kv_lora_rank=12, q_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6,
        n_experts=5, n_shared_experts=1, n_experts_per_tok=2, expert_dim=8, lora_rank=0, local_window=4, halting=False,
    )  # fmt: skip
    model = OpenMythos(MythosConfig(**cfg | changes)).eval()
    with torch.no_grad():
        for weight in model.parameters():  # norms and adapters start as identities, which would hide errors
            weight.add_(0.5 * weight.abs().mean().clamp(min=0.02) * torch.randn_like(weight))
        if model.recurrent.lora is not None:
            model.recurrent.lora.trained_loops.fill_(3)
    return model


def ids_of(*shape: int) -> torch.Tensor:
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_calls_of_any_length_give_the_logits_of_one_forward_pass(kind, padded):
    model, ids = a_model(**KINDS[kind]), ids_of(3, 36)
    mask = left_padding([4, 2, 1] if padded else [4, 4, 4], 4)
    whole = model(ids, 5, attention_mask=torch.nn.functional.pad(mask, (0, 32), value=True))
    for make in (ModuleEngine, *FAST.values()):
        engine = make(model, Depth(5))
        assert_near(engine.extend(ids[:, :4], mask), whole[:, 3])
        start = 4
        for n in (1, 1, 3, 20, 1, 2, 1):
            new, start = ids[:, start : start + n], start + n
            assert_near(engine.step(new) if n == 1 else engine.extend(new), whole[:, start - 1])
        engine.truncate(20)
        assert engine.cache.length == 20
        engine.extend(ids[:, 20:30])
        for i in range(30, 36):  # buffers grow on the way
            assert_near(engine.step(ids[:, i : i + 1]), whole[:, i])
        assert engine.state.shape == (3, 1, 32) and engine.cache.length == 36


@pytest.mark.parametrize("make", [ModuleEngine, *FAST.values()], ids=["modules", *FAST])
@pytest.mark.parametrize("attn_type", ATTENTION)
@torch.no_grad()
def test_a_given_first_state_replaces_the_models_own(attn_type, make):
    model, ids = a_model(attn_type=attn_type), ids_of(2, 8)
    cache, engine = KVCache(), make(model, Depth(5))
    h, ctx = model.states(ids[:, :6], 5, cache)
    model.decode(h, ctx)
    engine.extend(ids[:, :6])
    assert_near(engine.state, h[:, -1:])
    expected = model.head(model.decode(*model.states(ids[:, 6:7], 5, cache, first=h[:, -1:])))[:, -1]
    assert_near(engine.step(ids[:, 6:7], engine.state), expected)
    assert_near(engine.step(ids[:, 7:]), model(ids[:, 7:], 5, cache)[:, -1])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["modules", "fused"])
@torch.no_grad()
def test_verifying_drafted_tokens_gives_the_logits_of_full_depth(kind, name, padded):
    model, ids = a_model(**KINDS[kind]), ids_of(2, 12)
    mask = left_padding([6, 2] if padded else [6, 6], 6)
    whole, shallow = (model(ids, n, attention_mask=torch.nn.functional.pad(mask, (0, 6), value=True)) for n in (5, 2))
    engine = make_engine(name, model, Depth(5), drafts=True)
    engine.extend(ids[:, :6], mask)
    first = engine.draft(ids[:, 6:7], 2)
    if not padded and kind != "stretched rotary":
        cache = KVCache()
        model(ids[:, :6], 5, cache)
        assert_near(first, model(ids[:, 6:7], 2, cache)[:, -1])
    for i in (7, 8):
        engine.draft(ids[:, i : i + 1], 2)
    assert_near(engine.verify(), whole[:, 6:9])
    engine.truncate(8)  # the last draft was rejected
    for i in range(8, 12):
        engine.draft(ids[:, i : i + 1], 2)
    assert_near(engine.verify(), whole[:, 8:])
    assert not torch.allclose(first, whole[:, 6], atol=1e-3) and not torch.allclose(shallow, whole, atol=1e-3)
    assert set(engine.cache.lengths().values()) == {12}


@pytest.mark.parametrize("cache_loops", [None, 2])
@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_tokens_exit_at_the_same_loops_as_in_the_model(attn_type, cache_loops, rows):
    model, ids, exit = a_model(attn_type=attn_type), ids_of(rows, 30), StateChange(0.4)
    assert len(loops_used(model, ids, 5, exit=exit).unique()) > 1, "some tokens exit before others"
    depth, cache = Depth(5, exit, cache_loops), KVCache(cache_loops)
    made = [make_engine(name, model, depth) for name in ("modules", "fused")]
    expected = model(ids[:, :7], 5, cache, exit=exit)[:, -1]
    for engine in made:
        assert_near(engine.extend(ids[:, :7]), expected)
    for i in range(7, 30):
        token = ids[:, i : i + 1]
        expected = model(token, 5, cache, exit=exit)[:, -1]
        for engine in made:
            assert_near(engine.step(token), expected)
            assert engine.cache.lengths() == cache.lengths()


@pytest.mark.parametrize("name", ["modules", "fused"])
@torch.no_grad()
def test_exits_that_read_predictions_match_the_model(name):
    model, ids, exit, cache = a_model(), ids_of(2, 9), PredictionKL(0.05), KVCache()
    engine = make_engine(name, model, Depth(5, exit))
    assert_near(engine.extend(ids[:, :6]), model(ids[:, :6], 5, cache, exit=exit)[:, -1])
    for i in (6, 7, 8):
        assert_near(engine.step(ids[:, i : i + 1]), model(ids[:, i : i + 1], 5, cache, exit=exit)[:, -1])


@torch.no_grad()
def test_a_graph_is_captured_again_only_when_its_buffers_have_grown(monkeypatch):
    model, ids, opened = a_model(), ids_of(2, 40), []
    plain = GraphEngine._open
    monkeypatch.setattr(GraphEngine, "_open", lambda engine, *args: opened.append(args[1]) or plain(engine, *args))
    engine = GraphEngine(model, Depth(5), room=16)
    engine.extend(ids[:, :10])
    for i in range(10, 40):
        engine.step(ids[:, i : i + 1])
    assert opened == [16, 32, 64]


def test_operations_that_synchronise_are_not_captured_in_a_graph(monkeypatch):
    """Grouped products synchronise on most GPUs; they are used if rows choose more experts than are gathered."""
    engine = GraphEngine(a_model(), Depth(5))
    assert not engine._waits(1000)
    monkeypatch.setattr(graph, "grouping_waits", lambda x: True)
    per_row = engine.model.cfg.n_experts_per_tok
    assert engine._waits(graph.MAX_GATHERED // per_row + 1) and not engine._waits(graph.MAX_GATHERED // per_row)


# -- choice of an engine


def test_auto_selects_the_fastest_available_engine(monkeypatch):
    model, depth = a_model(), Depth(5)
    for name in ("native", "graph"):
        monkeypatch.setattr(engines._ENGINES[name], "why_not", lambda *_: "not here")
    engine = make_engine("auto", model, depth)
    assert type(engine) is ModuleEngine and isinstance(engine.step_model.recurrent.block, FusedBlock)
    assert engine.model is model, "prompts are processed by the modules"
    model.recurrent.block.attn.register_forward_hook(lambda *_: None)
    assert make_engine("auto", model, depth).step_model is model


def test_engines_selected_by_name_generate_the_same_tokens(monkeypatch):
    model, prompt = a_model(), ids_of(2, 7)
    found = [model.generate(prompt, 30, temperature=0, engine=name) for name in ("modules", "fused", "auto")]
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_unavailable_engines_are_refused_at_the_call_with_the_reason():
    model = a_model()
    with pytest.raises(ValueError, match="there is no engine 'fast'; "):
        model.stream(ids_of(1, 3), engine="fast")
    with pytest.raises(
        ValueError, match="engine='graph' is not available: CUDA graphs need a CUDA device; use engine='auto'"
    ):
        model.stream(ids_of(1, 3), engine="graph")
    model.recurrent.block.attn.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="engine='fused' is not available: the model has hooks, or replaced or quant"):
        check_engine("fused", model, Depth(5))


def test_hooks_and_replaced_layers_take_effect():
    """A model with hooks, replaced layers or overridden methods is decoded by the modules."""
    model = a_model(attn_type="gqa")
    assert why_not_fused(model) is None
    handle, seen = model.recurrent.block.attn.register_forward_hook(lambda *_: seen.append(1)), []
    assert why_not_fused(model)
    model.generate(torch.zeros(1, 3, dtype=torch.long), 4)
    assert len(seen) == 4 * 5
    handle.remove()
    assert why_not_fused(model) is None
    handle = model.recurrent.register_forward_hook(lambda module, inputs, output: 0 * output)
    silent = model.generate(torch.zeros(1, 3, dtype=torch.long), 4, temperature=0)
    assert silent[0, 3:].eq(silent[0, 3]).all(), "the hook makes all states the same"
    handle.remove()
    model.coda[0].attn.wq = torch.nn.Sequential(model.coda[0].attn.wq)
    assert why_not_fused(model)


def test_fusing_leaves_the_model_unchanged():
    model, ids = a_model(), ids_of(1, 5)
    before, names = model(ids), [name for name, _ in model.named_modules()]
    fused = fuse(model)
    assert_near(fused(ids), before)
    assert torch.equal(model(ids), before) and [name for name, _ in model.named_modules()] == names
    assert fused.embed is model.embed and fused.recurrent.act is model.recurrent.act


def test_an_engine_of_experts_and_stages_of_a_subclass_take_effect():
    class Negated(OpenMythos):
        def decode(self, *args, **options):
            return -super().decode(*args, **options)

    model, ids = a_model(), ids_of(1, 6)
    model.recurrent.block.ffn.engine = lambda x, *others: torch.zeros_like(x)
    negated = a_model()
    negated.__class__ = Negated
    for changed in (model, negated):
        expected = changed.generate(ids, 6, 3, temperature=0, engine="modules")
        assert torch.equal(changed.generate(ids, 6, 3, temperature=0), expected)
    assert "layers" in why_not_fused(model)
    with pytest.raises(ValueError, match="the model has its own encode_at, first_state or decode"):
        negated.generate(ids, 6, 3, engine="native")


def test_engines_agree_on_the_rotary_table_of_the_model():
    model, ids = a_model(), ids_of(1, 40)
    model.cfg.rope_theta = 3.0  # no field that may be changed later
    expected = model.generate(ids, 8, 3, temperature=0, engine="modules")
    assert torch.equal(model.generate(ids, 8, 3, temperature=0), expected)
