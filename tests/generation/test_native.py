"""The native engine computes the same as the modules, from the same cache, and gives the reason where it cannot."""

import copy
import logging
import multiprocessing
import os
import pickle
import platform
import signal
import subprocess
import sys

import pytest
import torch
from helpers import assert_near, left_padding, tiny_model, tokens

from open_mythos import KVCache, OpenMythos
from open_mythos.cache import ROLLBACK
from open_mythos.generation import engines
from open_mythos.generation.engine import Depth
from open_mythos.generation.engines import make_engine
from open_mythos.generation.native import build
from open_mythos.generation.native.engine import NativeEngine, why_not
from open_mythos.nn.exits import Gate, StableArgmax, StateChange
from open_mythos.nn.halting import ACTHalting

needs_compiler = pytest.mark.skipif(isinstance(build.library(), str), reason=str(build.library()))
ODD = dict(
    dim=36, n_heads=6, n_kv_heads=3, expert_dim=7, kv_lora_rank=11, q_lora_rank=13, v_head_dim=5, qk_nope_head_dim=9,
    qk_rope_head_dim=6, n_experts=3, conv_taps=4, local_window=5,
)  # fmt: skip
WIDE = dict(
    dim=144, n_heads=4, n_kv_heads=2, kv_lora_rank=40, q_lora_rank=33, v_head_dim=24, qk_rope_head_dim=8, expert_dim=40
)
KINDS = {
    "gqa": dict(attn_type="gqa"),
    "mla": dict(attn_type="mla"),
    "gqa, odd sizes": dict(attn_type="gqa", **ODD),
    "mla, odd sizes": dict(attn_type="mla", **ODD),
    "gqa, more than a vector": dict(attn_type="gqa", **WIDE),
    "mla, more than a vector": dict(attn_type="mla", **WIDE),
    "gqa, no convolution, one expert": dict(attn_type="gqa", conv_taps=0, n_experts=1, n_experts_per_tok=1),
    "gqa, a convolution of one tap": dict(attn_type="gqa", conv_taps=1),
    "mla, no convolution, no coda": dict(attn_type="mla", conv_taps=0, coda_layers=0, state_init="zero"),
    "mla, no local heads, no shared expert": dict(attn_type="mla", local_share=0.0, n_shared_experts=0),
    "all heads local": dict(attn_type="gqa", local_share=1.0, lora_rank=0),
    "one key head, wide window": dict(attn_type="gqa", n_kv_heads=1, local_window=50),
    "loop index": dict(attn_type="mla", loop_index_dim=6, input_norm=False),
    "stretched rotary": dict(attn_type="gqa", rope_factor=4.0, rope_context=20, rope_theta=100.0),
    "three dense blocks in the core": dict(
        attn_type="gqa", core_layers=3, n_experts=0, dense_dim=19, tied_head=False, norm_eps=1e-3
    ),
    "two blocks of experts, no state norm": dict(attn_type="mla", core_layers=2, state_norm=False, prelude_layers=0),
}


def a_model(**changes) -> OpenMythos:
    return tiny_model(**dict(attn_type="gqa", max_seq_len=256, halting=False) | changes)


class OwnGate(ACTHalting):
    """A gate written by a user."""


# Threads that share a core mostly wait for each other: most kinds run on one thread, the others decode few tokens.
THREADED = ["gqa", "mla, odd sizes", "three dense blocks in the core", "two blocks of experts, no state norm"]
CASES = [*((kind, n_rows, 1) for kind in KINDS for n_rows in (1, 3)), *((kind, 2, 3) for kind in THREADED)]


@needs_compiler
@pytest.mark.parametrize("kind, n_rows, n_threads", CASES)
@torch.no_grad()
def test_every_token_has_the_logits_of_one_forward_pass(kind, n_rows, n_threads, threads):
    """Far beyond the ring buffer of raw rows, and through several sizes of the buffers of final ones."""
    threads(n_threads)
    model, text = a_model(**KINDS[kind]), tokens(n_rows, 110)
    whole, engine = model(text, 5), NativeEngine(model, Depth(5))
    start = 2 if n_threads == 1 else 95  # shorter than a window, and than a convolution of four taps
    engine.extend(text[:, :start])
    found = [engine.step(text[:, i : i + 1]) for i in range(start, 110)]
    assert_near(torch.stack(found, 1), whole[:, start:])
    assert set(engine.cache.lengths().values()) == {110}
    assert engine.used == [5] * n_rows


@needs_compiler
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
@torch.no_grad()
def test_native_steps_and_module_calls_alternate_on_one_cache(attn_type):
    model, text, at = a_model(attn_type=attn_type), tokens(2, 160), 4
    whole, engine = model(text, 5), NativeEngine(model, Depth(5))
    engine.extend(text[:, :at])
    for n, cut in ((1, 0), (1, 1), (20, 0), (1, 0), (1, 15), (100, 0), (1, ROLLBACK), (1, 0), (30, 0), (1, 0)):
        new = text[:, at : at + n]
        logits = engine.step(new) if n == 1 else engine.extend(new)
        assert_near(logits, whole[:, at + n - 1])
        at += n - cut
        engine.truncate(at)
    engine.truncate(at - ROLLBACK - 1)
    with pytest.raises(ValueError, match=f"truncate by at most {ROLLBACK} tokens"):
        engine.step(text[:, :1])
    engine.truncate(0)
    for i in range(3):
        assert_near(engine.step(text[:, i : i + 1]), whole[:, i])


@needs_compiler
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
@pytest.mark.parametrize("n_threads", [1, 3])
@torch.no_grad()
def test_left_padded_rows_give_the_logits_of_one_forward_pass(attn_type, n_threads, threads):
    threads(n_threads)
    model, text = a_model(attn_type=attn_type), tokens(4, 90)
    whole, engine = model(text, 5, attention_mask=left_padding([90, 71, 87, 70], 90)), NativeEngine(model, Depth(5))
    start = 20 if n_threads == 1 else 75
    engine.extend(text[:, :start], left_padding([start, start - 19, start - 3, start - 20], start))
    for i in range(start, 90):
        step = engine.extend if i % 10 == 9 else engine.step
        assert_near(step(text[:, i : i + 1]), whole[:, i], what=f"token {i}")


# -- exits

EXITS = (
    (None, None),  # the model's own gate
    (Gate(0.6), None),
    (Gate(0.6), 3),
    (StateChange(0.2), 3),
    (StateChange(0.4, patience=2), 20),
)
HALTING_KINDS = {
    "gqa": dict(attn_type="gqa"),
    "mla": dict(attn_type="mla"),
    "mla, two blocks in the core": dict(attn_type="mla", core_layers=2),
    "three dense blocks, no prelude": dict(attn_type="gqa", core_layers=3, n_experts=0, dense_dim=19, prelude_layers=0),
    "a gate of 256": dict(attn_type="gqa", dim=264, n_experts=2),
}


def a_halting_model(**changes) -> OpenMythos:
    """A model whose gate halts some positions at every loop."""
    return a_model(**dict(max_loop_iters=8, halting=True, act_threshold=0.7, gate_bias=-1.5) | changes)


def by_modules(model, new, cache, exit):
    """State and logits after tokens (B, 1), and the number of loops of each row."""
    e, ctx = model.encode(new, cache)
    used = torch.zeros(len(new), dtype=torch.long)
    for state in model.recurrent.iterate(model.first_state(e, ctx), e, ctx, exit=exit):
        used += state.ran[:, 0]
    return state.h, model.head(model.decode(state.h, ctx)[:, -1]), used.tolist()


@needs_compiler
@pytest.mark.parametrize("exit, cache_loops", EXITS, ids=str)
@pytest.mark.parametrize("kind, n_threads", [*((kind, 1) for kind in HALTING_KINDS), ("mla", 3)])
@torch.no_grad()
def test_rows_halt_at_the_same_loops_as_in_the_modules(kind, n_threads, exit, cache_loops, threads):
    threads(n_threads)
    padding = None if exit is None else left_padding([4, 2, 3], 4)
    model, text, cache = a_halting_model(**HALTING_KINDS[kind]), tokens(3, 24), KVCache(cache_loops)
    engine, seen = NativeEngine(model, Depth(8, exit, cache_loops)), set()
    model(text[:, :4], kv_cache=cache, exit=exit, attention_mask=padding)
    engine.extend(text[:, :4], padding)
    for i in range(4, 24):
        h, logits, used = by_modules(model, text[:, i : i + 1], cache, exit)
        assert_near(engine.step(text[:, i : i + 1]), logits, 1e-4)
        assert_near(engine.state, h, 1e-4)
        assert engine.used == used, f"token {i}"
        seen.add(tuple(used))
    assert max(len(set(used)) for used in seen) > 1, "rows halt at different loops"
    assert engine.cache.lengths() == cache.lengths()
    for slot in cache._slots:
        expected, found = cache.slot(slot), engine.cache.slot(slot)
        assert_near(found.rows, expected.rows, 1e-4, f"{slot}")
        assert_near(found.raw_before(24, 2), expected.raw_before(24, 2), 1e-4, f"{slot}")


@needs_compiler
@torch.no_grad()
def test_patience_above_the_number_of_loops_runs_all_loops():
    engine = NativeEngine(a_model(), Depth(5, StateChange(100.0, patience=2**40)))
    engine.extend(tokens(2, 4))
    engine.step(tokens(2, 1))
    assert engine.used == [5, 5]


# -- generation


@needs_compiler
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize(
    "options", [{}, dict(cache_loops=2), dict(warm_start=True), dict(exit=StateChange(0.3)), dict(padded=True)], ids=str
)
def test_generation_gives_the_tokens_of_the_modules(attn_type, n_rows, options):
    model, prompt = a_halting_model(attn_type=attn_type, state_init="noise").train(), tokens(n_rows, 7)
    if "padded" in options:
        options = dict(attention_mask=left_padding([4, 7, 5][:n_rows], 7))
    expected = model.generate(prompt, 80, temperature=0, engine="modules", **options)
    assert model.generate(prompt, 80, temperature=0, engine="native", **options).equal(expected)
    assert model.training


@needs_compiler
def test_sampled_tokens_are_the_same_and_auto_selects_native_on_a_cpu():
    model, prompt = a_model(), tokens(2, 7)
    drawn = [
        model.generate(prompt, 20, engine=engine, generator=torch.Generator().manual_seed(3))
        for engine in ("modules", "native")
    ]
    assert drawn[0].equal(drawn[1])
    assert type(make_engine("auto", model, Depth(4))) is NativeEngine


@needs_compiler
@pytest.mark.parametrize("name, exit", [("parity-tiny", None), ("text-tiny", StateChange(0.1, patience=2))])
def test_shipped_models_generate_the_same_tokens(name, exit):
    model = OpenMythos.from_pretrained(name).float()
    prompt = tokens(2, 9, high=model.cfg.vocab_size)
    expected = model.generate(prompt, 24, temperature=0, exit=exit, engine="modules")
    assert model.generate(prompt, 24, temperature=0, exit=exit, engine="native").equal(expected)


@needs_compiler
def test_interleaved_streams_with_a_pause_generate_the_same_tokens(threads):
    threads(2)
    model = a_model()
    expected = model.generate(tokens(1, 7), 12, temperature=0, engine="modules")[0, 7:].tolist()
    texts = [model.stream(tokens(1, 7), 12, temperature=0, engine="native") for _ in range(2)]
    found = []
    for pair in zip(*texts, strict=True):
        found.append([int(token) for token in pair])
        if len(found) == 6:
            torch.empty(1).new_ones(3_000_000).sort()  # longer than idle worker threads stay awake
    assert found == [[token, token] for token in expected]


# -- where it is not available


@needs_compiler
@pytest.mark.parametrize(
    "change, depth, reason",
    [
        (lambda model: model.bfloat16(), Depth(4), "in float32, but the model is torch.bfloat16 on cpu"),
        (lambda model: model.to("meta"), Depth(4), "CPU in float32, but the model is torch.float32 on meta"),
        (lambda model: None, Depth(4, StableArgmax()), "supports the exits Gate and StateChange, not StableArgmax"),
        (lambda model: setattr(model.recurrent, "act", OwnGate(32)), Depth(4, Gate()), "a gate that was replaced"),
        (lambda model: model.recurrent.act.register_forward_hook(print), Depth(4, Gate()), "a gate that was replaced"),
        (lambda model: setattr(model.recurrent.act, "forward", len), Depth(4, Gate()), "a gate that was replaced"),
        (lambda model: model.coda[0].register_forward_hook(print), Depth(4), "has hooks, or replaced"),
        (lambda model: model.head.register_forward_hook(print), Depth(4), "has hooks, or replaced"),
        (lambda model: model.recurrent.register_forward_hook(print), Depth(4), "has hooks, or replaced"),
        (lambda model: setattr(model, "norm", torch.nn.LayerNorm(32)), Depth(4), "has hooks, or replaced"),
    ],
)  # fmt: skip
def test_unsupported_models_and_exits_are_refused_with_the_reason(change, depth, reason):
    model = a_model()
    assert why_not(model, Depth(4), drafts=False) is None
    change(model)
    assert reason in why_not(model, depth, drafts=False)
    with pytest.raises(ValueError, match=rf"engine='native' is not available: .*{reason}"):
        model.stream(tokens(1, 3), 4, n_loops=4, exit=depth.exit, engine="native")


@needs_compiler
@pytest.mark.parametrize(
    "changes", [dict(router_score="softmax"), dict(recurrence="mixture"), dict(causal=False)], ids=str
)
def test_unsupported_architectures_are_left_to_the_modules(changes):
    assert "supports recurrence='injected'" in why_not(tiny_model(**changes), Depth(4), drafts=False)


@needs_compiler
def test_models_with_a_bridge_are_left_to_the_modules():
    model = tiny_model(bridge_dim=12)
    assert why_not(model, Depth(4), drafts=False) == "it does not support a bridge, but the model has bridge_dim=12"
    ids = tokens(1, 5)
    assert torch.equal(
        model.generate(ids, 6, 4, temperature=0), model.generate(ids, 6, 4, temperature=0, engine="modules")
    )


@needs_compiler
def test_drafts_autocast_and_open_mythos_native_0_rule_out_the_engine(monkeypatch):
    model = a_model()
    assert "drafts need several at once" in why_not(model, Depth(4), drafts=True)
    with torch.autocast("cpu"):
        assert "autocast" in why_not(model, Depth(4), drafts=False)
    monkeypatch.setenv("OPEN_MYTHOS_NATIVE", "0")
    assert why_not(model, Depth(4), drafts=False) == "OPEN_MYTHOS_NATIVE=0 is set"


@needs_compiler
def test_a_hook_on_the_gate_does_not_rule_out_other_exits():
    model = a_model()
    model.recurrent.act.register_forward_hook(print)
    assert why_not(model, Depth(4, StateChange(0.3)), drafts=False) is None


# -- the compiler


@pytest.fixture
def empty_compile_cache(monkeypatch, tmp_path):
    """As in a process that starts with an empty cache directory; yields the folder of the compiled library."""
    monkeypatch.delenv("OPEN_MYTHOS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    yield tmp_path / "open_mythos"
    build.library.cache_clear()


@pytest.mark.parametrize(
    "command, reason",
    [
        (None, "no C compiler was found"),
        (["false"], "no C compiler that works here: false says: exit status 1"),
        (["sh", "-c", "echo one >&2; echo 'x.c:1: fatal error: no math.h' >&2; echo three >&2; exit 1"], "no math.h"),
        (["true"], "set OPEN_MYTHOS_CACHE to keep it in another folder"),  # succeeds, but writes nothing
    ],
)
def test_without_a_compiler_generation_falls_back_and_warns_once(
    command, reason, empty_compile_cache, monkeypatch, caplog
):
    monkeypatch.setattr(build, "compiler", lambda: command)
    monkeypatch.setattr(engines, "_reported", set())
    model, prompt = a_model(), tokens(1, 3)
    with caplog.at_level(logging.WARNING, "open_mythos"):
        found = [model.generate(prompt, 4, temperature=0) for _ in range(2)]
    assert found[0].equal(found[1]) and found[0].equal(model.generate(prompt, 4, temperature=0, engine="modules"))
    (warning,) = [record.getMessage() for record in caplog.records]
    assert reason in warning and "\n" not in warning
    with pytest.raises(ValueError, match=reason):
        model.generate(prompt, 4, engine="native")


def test_a_missing_c_source_is_reported(empty_compile_cache, monkeypatch, tmp_path):
    """As in a folder exported for transformers."""
    monkeypatch.setattr(build, "SOURCE", tmp_path / "decode.c")
    assert why_not(a_model(), Depth(4), drafts=False) == "decode.c is missing; it comes only with the installed package"


@needs_compiler
def test_the_library_is_compiled_once(empty_compile_cache, monkeypatch):
    for _ in range(2):
        assert not isinstance(build.library(), str)
        build.library.cache_clear()
        monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert [path.suffix for path in empty_compile_cache.iterdir()] == [".so"]
    assert len({build._key(command) for command in (["cc"], ["clang"], ["cc", "-O2"])}) == 3


def test_compiled_code_is_not_kept_in_a_folder_writable_by_others(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("OPEN_MYTHOS_CACHE", str(tmp_path))
    tmp_path.chmod(0o700)
    assert build._folder() == tmp_path
    tmp_path.chmod(0o777)
    with caplog.at_level(logging.WARNING, "open_mythos"):
        assert build._folder() != tmp_path
    (warning,) = [record.getMessage() for record in caplog.records]
    assert str(tmp_path) in warning and "others can write to it" in warning


@needs_compiler
def test_two_processes_can_compile_at_the_same_time(empty_compile_cache):
    code = "from open_mythos.generation.native.build import library; raise SystemExit(isinstance(library(), str))"
    both = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert [path.suffix for path in empty_compile_cache.iterdir()] == [".so"]


def in_child(work) -> None:
    """Call ``work`` in a forked process, which has none of this one's threads, with a limit of 20 seconds."""
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends the child if it hangs
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


@needs_compiler
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_stream_continues_in_a_forked_child_and_in_its_parent(threads):
    threads(2)
    model, prompt = a_model(), tokens(1, 5)
    expected = model.generate(prompt, 12, temperature=0, engine="native")[0, 5:].tolist()
    stream = model.stream(prompt, 12, temperature=0, engine="native")
    first = [int(next(stream)) for _ in range(4)]

    def finish() -> None:
        assert first + [int(token) for token in stream] == expected
        assert model.generate(prompt, 12, temperature=0, engine="native")[0, 5:].tolist() == expected

    in_child(finish)
    finish()


def generated(model: OpenMythos, prompt: torch.Tensor) -> list[int]:
    return model.generate(prompt, 6, temperature=0, engine="native").tolist()


@needs_compiler
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_a_model_generates_in_other_processes(how, threads):
    threads(2)
    model, prompt = a_model(), tokens(1, 5)
    expected = generated(model, prompt)
    with multiprocessing.get_context(how).Pool(1) as pool:
        assert pool.apply_async(generated, (model, prompt)).get(60) == expected


class Generated(torch.utils.data.Dataset):
    def __init__(self, model: OpenMythos) -> None:
        self.model = model

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.model.generate(tokens(1, 5, seed=i), 6, temperature=0, engine="native")[0]


@needs_compiler
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_data_loader_workers_generate_the_same_tokens():
    data = Generated(a_model())
    here = torch.stack([data[i] for i in range(2)])
    assert next(iter(torch.utils.data.DataLoader(data, batch_size=2, num_workers=1))).equal(here)


@needs_compiler
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_model_generates_the_same_tokens(copied):
    model, prompt = a_model(), tokens(1, 5)
    expected = generated(model, prompt)
    stream = model.stream(prompt, 6, temperature=0, engine="native")
    next(stream)
    assert generated(copied(model), prompt) == expected
    assert len(list(stream)) == 5


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64")
@pytest.mark.parametrize("flags", ["-mno-avx512f", "-mno-avx"])
@torch.no_grad()
def test_narrower_vector_instructions_give_the_same_logits(flags, empty_compile_cache, monkeypatch):
    monkeypatch.setenv("CC", " ".join([*build.compiler(), flags]))
    for kind in ("mla", "gqa, odd sizes", "gqa, more than a vector"):
        model, text = a_model(**KINDS[kind]), tokens(2, 50)
        engine = NativeEngine(model, Depth(5))
        engine.extend(text[:, :3])
        found = [engine.step(text[:, i : i + 1]) for i in range(3, 50)]
        assert_near(torch.stack(found, 1), model(text, 5)[:, 3:], what=kind)


@needs_compiler
@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_torchs_default_dtype_and_device_have_no_effect(attn_type):
    model = a_model(attn_type=attn_type, loop_index_dim=6)
    logits = torch.cat([first_logits(model, engine) for engine in ("modules", "native")])
    assert_near(logits[:2], logits[2:])
    try:
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            assert torch.equal(first_logits(model, "native"), logits[2:])
        torch.set_default_dtype(torch.float32)
        torch.set_default_device("meta")
        assert torch.equal(first_logits(model, "native"), logits[2:])
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def first_logits(model, engine):
    """Logits of the first token that the engine itself decodes."""
    made = make_engine(engine, model, Depth(4))
    made.extend(torch.tensor([[1, 2, 3], [4, 5, 6]], device="cpu"))
    return made.step(torch.tensor([[7], [8]], device="cpu"))
