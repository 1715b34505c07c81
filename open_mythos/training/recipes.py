"""Recipes: functions that return the config of a run that is known to work."""

from collections.abc import Callable, Iterable
from typing import Any

from open_mythos import tasks
from open_mythos.checkpoint import CONFIG_FILE
from open_mythos.config import MythosConfig
from open_mythos.fields import must, nearest
from open_mythos.tasks import mixture, tokenizer
from open_mythos.tasks.store import is_store
from open_mythos.tasks.text import Text
from open_mythos.training import runs
from open_mythos.training.config import EvalConfig, GateConfig, LoopConfig, OptimConfig, TaskConfig, TrainConfig
from open_mythos.training.overrides import override


def parity() -> TrainConfig:
    """Is the sum of the bits so far odd? Trained on 24 bits, right on hundreds."""
    return _reasoner(
        "parity", range(6, 25), loops=24, steps=1200, stale=0.5, gate=(96, 64),
        evaluation=EvalConfig([24, 48, 96, 384], [1, 2, 4, 8, 16, 32, 64, 128, 256], 64),
    )  # fmt: skip


def prefix_sums() -> TrainConfig:
    """The Deep Thinking benchmark: trained on 32 bits, tested on 512."""
    return _reasoner(
        "prefix_sums", range(8, 33), loops=32, steps=1200, stale=0.5, gate=(128, 96),
        evaluation=EvalConfig([32, 128, 512], [1, 2, 4, 8, 16, 32, 64, 128, 256], 64),
    )  # fmt: skip


def chain_sum() -> TrainConfig:
    """The sum of digits modulo 7, with only the final answer supervised: trained on 5 digits."""
    cfg = _reasoner(
        "chain_sum", range(2, 6), loops=12, steps=1600, window=2, taps=0, stale=0.5, gate=(32, 64), batch_size=256,
        evaluation=EvalConfig([5, 8, 16, 32], [1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128], 256),
    )  # fmt: skip
    cfg.loops.minimum = 6  # fewer loops do not reach all digits; supervised there, some seeds learn nothing
    cfg.model.halting_tolerance = 0.2  # unscored positions converge slowly, and need not converge
    return cfg


def p_hop() -> TrainConfig:
    """p-hop induction, following successors in a random cycle: trained on 6 hops, tested on 12."""
    cfg = _reasoner(
        "p_hop", range(1, 7), loops=15, steps=1500, window=2, local_share=0.5, lr=8e-4, gate=(12, 48),
        options={"symbols": 14, "questions": 7},
        evaluation=EvalConfig([6, 9, 12], [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128], 128),
    )  # fmt: skip
    cfg.loops.minimum = 3  # not even one hop is within reach of fewer loops
    return cfg


def addition() -> TrainConfig:
    """Sums of long numbers, carries and all: trained on 10 digits, tested on 20 and 40."""
    return _reasoner(
        "addition", range(3, 11), loops=16, steps=1500, stale=0.5, gate=(40, 64),
        evaluation=EvalConfig([10, 20, 40], [1, 2, 4, 8, 16, 32, 64, 128], 256),
    )  # fmt: skip


def permutations() -> TrainConfig:
    """Products of permutations of five elements (S5 state tracking): trained on 12, tested on 24."""
    cfg = _reasoner(
        "permutations", range(4, 13), loops=18, steps=2000, window=2, dim=128, gate=(48, 64),
        options={"generators": "transpositions"},
        evaluation=EvalConfig([12, 24, 48], [1, 2, 4, 8, 12, 16, 24, 32, 64, 128], 256),
    )  # fmt: skip
    cfg.optim.optimizer, cfg.optim.muon_lr = "muon", 2e-3
    return cfg


def maze() -> TrainConfig:
    """Which cells of a grid can be reached from the start? Trained on 7 x 7; at chance on larger grids so far."""
    return _reasoner(
        "maze", range(4, 8), loops=16, steps=1500, local_share=0.0, prelude=1,
        evaluation=EvalConfig([7, 9, 11], [1, 2, 4, 8, 16, 32, 64], 128),
    )  # fmt: skip


def mini_sudoku() -> TrainConfig:
    """4 x 4 sudoku: trained on 6 empty cells, tested on 9."""
    return _reasoner(
        "mini_sudoku", range(1, 7), loops=12, steps=2000, local_share=0.0, prelude=1,
        evaluation=EvalConfig([3, 6, 9], [1, 2, 4, 8, 16, 32], 256),
    )  # fmt: skip


def assignments() -> TrainConfig:
    """Who has what, by following references between sentences: trained on 6 hops, tested on 24."""
    cfg = _in_words(
        "assignments", range(1, 7), loops=13, gate=(12, 32), window=8,
        options={"sentences": 32, "min_sentences": 10},
        evaluation=EvalConfig([6, 12, 24], [1, 2, 4, 8, 14, 26, 52, 104], 64),
    )  # fmt: skip
    cfg.steps, cfg.optim.decay, cfg.stretch = 1600, 0.5, 1.5  # stretch: for prompts of twice the length
    return cfg


def word_problems() -> TrainConfig:
    """How many coins somebody has, modulo 7, by adding up what sentences say: trained on 6 operations, tested on 12."""
    cfg = _in_words(
        "word_problems", range(1, 7), loops=13, gate=(9, 16), options={"min_people": 8},
        evaluation=EvalConfig([6, 9, 12], [1, 2, 4, 9, 12, 15, 32, 64], 128),
    )  # fmt: skip
    cfg.steps = 2600  # sums of sums are learned last
    return cfg


def relations() -> TrainConfig:
    """Who is whose cook's neighbour, by facts in the prompt: trained on 3 hops, tested on 6."""
    cfg = _in_words(  # with this window a relation sees only the one before it: the fourth is then like the second
        "relations", range(1, 4), loops=13, gate=(6, 15), window=4, options={"questions": 10},
        evaluation=EvalConfig([1, 3, 6], [1, 2, 3, 5, 7, 13, 16, 28, 52], 128),
    )  # fmt: skip
    cfg.steps, cfg.optim.decay, cfg.model.dropout = 1300, 0.5, 0.05
    cfg.loss.fixed_point = 1.0  # states that alternate between two neither halt nor let others halt
    return cfg


def registers() -> TrainConfig:
    """What a register holds after a program in words: trained on 12 lines, tested on 24."""
    cfg = _in_words(
        "registers", range(6, 13), loops=16, gate=(12, 27), options={"lines": 24},
        evaluation=EvalConfig([6, 12, 24], [1, 2, 4, 8, 11, 19, 35, 76, 140], 128),
    )  # fmt: skip
    cfg.loops.grown = 0.6
    cfg.steps, cfg.task.growth = 3000, 0.94  # chains and conditions are learned last
    cfg.stretch, cfg.model.rope_context = 2.0, 120  # for programs of twice the length
    return cfg


def words() -> TrainConfig:
    """All tasks in words by one model, which writes its answer and an end: trained on up to 6 steps, tested on 12."""
    settings = {
        "assignments": {"min_sentences": 10}, "word_problems": {"min_people": 8}, "relations": {"questions": 10},
        "registers": {"lines": 24},
    }  # fmt: skip
    cfg = _in_words(
        "words", range(1, 7), loops=16, gate=(12, 32), window=12, options={"settings": settings},
        evaluation=EvalConfig([3, 6, 12], [1, 2, 4, 8, 16, 32, 64], 128),
    )  # fmt: skip
    cfg.steps, cfg.optim.decay, cfg.loops.grown, cfg.task.growth = 2130, 0.45, 0.6, 0.93
    cfg.model.max_loop_iters = 32
    return cfg


def reasoning_gym() -> TrainConfig:
    """Any generator of reasoning-gym (task.options.generator=...), as bytes."""
    return _reasoner(
        "reasoning_gym", range(2, 5), loops=8, steps=2000, local_share=0.5, prelude=1, dim=128,
        options={"generator": "chain_sum"},
        evaluation=EvalConfig([2, 4, 6], [1, 2, 4, 8, 16], 64),
    )  # fmt: skip


def text() -> TrainConfig:
    """Language modelling on the Python standard library's sources, by bytes, at four loops.

    Each loop is supervised, so that at one loop it predicts nearly as well as a model that was trained for one. With a
    low injection decay the state keeps little of the last one and converges by the fourth loop, so more do no harm.
    """
    cfg = _reasoner(
        "text", range(128, 129), loops=4, steps=2000, local_share=0.5, prelude=1, coda=1, dim=128, batch_size=8,
        evaluation=EvalConfig([128], [1, 2, 4, 8, 16, 32], 256),
    )  # fmt: skip
    cfg.loops = LoopConfig("fixed", mean=4.0, maximum=4, gradient="all")
    cfg.loss.depth, cfg.model.injection_decay = "uniform", 0.4
    cfg.gate.steps = 0
    return cfg


def heal() -> TrainConfig:
    """Train a model made by `mythos retrofit` (start=DIR) to use its loops: on text, with a depth curriculum."""
    cfg = text()
    cfg.task.options = {"max_bytes": 1 << 22}
    cfg.loops = LoopConfig("curriculum", minimum=1, maximum=4, ramp=0.25, gradient="last", grad_loops=4)
    cfg.loss.depth = "final"  # with a vocabulary of tens of thousands, supervising a loop costs as much as running it
    cfg.model.max_loop_iters = 4
    cfg.optim = OptimConfig(lr=1e-4, warmup=20, ema=0.9)
    cfg.evaluation = EvalConfig([128], [1, 2, 4, 8], 32)
    cfg.steps, cfg.keep = 200, 1
    return cfg


def bridge() -> TrainConfig:
    """Train an adapter, in a model made by `mythos retrofit` (start=DIR), to use its loops on tasks in words.

    The weights of the model stay frozen. Loop k is supervised with what is known after k - 1 steps of the solution, and
    in the last 30% of the run with the answer alone.
    """
    cfg = _reasoner(
        "assignments", range(1, 4), loops=6, steps=600, lr=2e-3, batch_size=8,
        options={"sentences": 8, "min_sentences": 7, "questions": 3},
        evaluation=EvalConfig([1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 8, 12], 64),
    )  # fmt: skip
    cfg.loops = LoopConfig("by_steps", minimum=1, maximum=6, gradient="all")
    cfg.loss.depth, cfg.loss.outcome, cfg.task.growth = "steps", 0.3, 0.85
    cfg.optim.only, cfg.optim.warmup, cfg.optim.decay = "bridge", 30, 0.4
    cfg.gate.steps, cfg.keep = 0, 1
    return cfg


def demo() -> TrainConfig:
    """What `mythos demo` trains: parity of 24 bits, by a model with experts, at up to 8 loops."""
    cfg = _reasoner(
        "parity", range(24, 25), loops=8, steps=800,
        evaluation=EvalConfig([24, 48, 96], [1, 2, 3, 4, 6, 8, 12, 16, 24, 32], 256),
    )  # fmt: skip
    cfg.model = MythosConfig(
        vocab_size=cfg.model.vocab_size, dim=64, n_heads=4, n_kv_heads=2, max_seq_len=128, max_loop_iters=16,
        prelude_layers=1, coda_layers=1, attn_type="gqa", halting=False,
        n_experts=4, n_shared_experts=1, n_experts_per_tok=2, expert_dim=32, lora_rank=0,
    )  # fmt: skip
    cfg.loops.gradient, cfg.optim.warmup, cfg.gate = "all", 0, GateConfig(steps=0)
    return cfg


def debug() -> TrainConfig:
    """A few seconds of running parity, as a smoke test."""
    cfg = _reasoner("parity", range(2, 9), loops=4, steps=30, dim=16, evaluation=EvalConfig([8, 16], [1, 4, 8], 32))
    cfg.batch_size = 16
    cfg.optim.warmup = 5
    cfg.gate = GateConfig(steps=10, batch_size=8)
    cfg.log_every, cfg.save_every = 5, 10
    return cfg


RECIPES: dict[str, Callable[[], TrainConfig]] = {function.__name__: function for function in (
    parity, prefix_sums, chain_sum, p_hop, addition, permutations, maze, mini_sudoku, assignments, word_problems,
    relations, registers, words, reasoning_gym, text, heal, bridge, demo, debug,
)}  # fmt: skip


def recipe(name: str) -> TrainConfig:
    """The config of a recipe.

    Raises:
        ValueError: for an unknown name, with the nearest known one.
    """
    must("=" not in name, f"{name!r} is a setting; name a recipe before it, as in parity {name}")
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; {nearest(name, RECIPES)}")
    cfg = RECIPES[name]()
    cfg.recipe = name
    return cfg


def configured(name: str, assignments: Iterable[str] = ()) -> TrainConfig:
    """A recipe with overrides (see :func:`~open_mythos.training.overrides.override`).

    The vocabulary size is the task's, unless overridden. For text, ``data=SOURCE`` (separate documents),
    ``tokenizer=KIND`` and ``length=TOKENS`` (of a row) are shorthands for keys of task and evaluation. With ``start``,
    the model has the config of that checkpoint, and text or problems in words are encoded by its tokenizer, if it has
    one. Paths become absolute.

    Raises:
        ValueError: as :func:`recipe` and ``override``, and for invalid options of the task.
    """
    cfg = recipe(name)
    expanded, keys = list[str](), set[str]()
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        must(key not in keys, f"{key} is set twice; give it once")
        keys.add(key)
        is_known = key not in _SHORTHANDS or cfg.task.name == Text.name
        must(is_known, f"{key}= is only for text recipes; {cfg.recipe} generates its own problems")
        expanded += [full.format(value) for full in _SHORTHANDS[key]] if key in _SHORTHANDS else [assignment]
    given = dict(assignment.split("=", 1) for assignment in expanded if "=" in assignment)
    if "start" in given:
        directory = runs.model_dir(given["start"])
        cfg.model = MythosConfig.load(directory / CONFIG_FILE)
        if name == bridge.__name__:
            cfg.model.bridge_dim = cfg.model.bridge_dim or _BRIDGE
        cfg.task.options |= runs.own_tokens(given.get("task.name", cfg.task.name), directory)
    elif name in (heal.__name__, bridge.__name__):
        raise ValueError(
            f"{name} continues training a model; give start=DIR, the output directory of `mythos retrofit`"
        )
    cfg = override(cfg, expanded)
    if name == bridge.__name__:
        must(cfg.model.bridge_dim > 0, "model.bridge_dim=0 leaves nothing to train; leave it out, or use 64 or more")
        state, needed = cfg.model.state_init, "the state to start from the input: model.state_init=input"
        must(state == "input", f"model.state_init={state!r}, but a bridge needs {needed}")
    # absolute paths, so that the run can be resumed from any directory
    cfg.start, cfg.loss.teacher = runs.everywhere(cfg.start), runs.everywhere(cfg.loss.teacher)
    if cfg.task.name == Text.name:
        options = cfg.task.options
        if "source" in options:
            texts = [(runs.everywhere(name), weight) for name, weight in mixture.parsed(str(options["source"]))]
            options["source"] = mixture.joined(texts)
            if is_store(texts[0][0]):
                options.setdefault("tokenizer", texts[0][0])
    if cfg.task.options.get("tokenizer"):
        cfg.task.options["tokenizer"] = runs.everywhere(str(cfg.task.options["tokenizer"]))
    if not given.keys() & {"model.vocab_size", "start"}:
        cfg.model.vocab_size = tasks.load(cfg.task.name, **cfg.task.options).vocab_size
    if "start" in given:
        _check_tokens(cfg)
    return cfg


def _check_tokens(cfg: TrainConfig) -> None:
    """Raise ValueError for problems in words if the starting model has another vocabulary and no tokenizer is given."""
    is_told = bool(cfg.task.options.get("tokenizer"))
    if cfg.task.name == Text.name or is_told or "tokenizer" not in tasks.options_of(cfg.task.name):
        return
    n, expected = cfg.model.vocab_size, tasks.load(cfg.task.name, **cfg.task.options).vocab_size
    has = f"start={cfg.start!r} has {n} tokens and no {tokenizer.FILE}, but {cfg.task.name} has {expected} words"
    must(n == expected, f"{has}; give task.options.tokenizer=DIR, the folder of its tokenizer")


_BRIDGE = 1536
"""Hidden width of a new bridge: 2.7 million parameters, for a SmolLM2 of 135 million."""

_SHORTHANDS = {
    "data": ("task.options.source={}", "task.options.separate=true"),
    "tokenizer": ("task.options.tokenizer={}",),
    "length": ("task.min_difficulty={}", "task.max_difficulty={}", "evaluation.difficulties={}"),
}


def _in_words(
    task: str, difficulties: range, *, loops: int, evaluation: EvalConfig, gate: tuple[int, int],
    options: dict[str, Any], window: int = 16,
) -> TrainConfig:  # fmt: skip
    """The common config of tasks in words: one step of the solution per loop, growing from two loops on small problems.

    Two heads tell a hundred names apart better than four of half the width. With this rope_theta two pairs of channels
    rotate within a sentence and most others hardly at all, so that a name is found at any distance up to the trained.

    A result found at one position is read by others in later loops. Nothing in a single loop's loss makes it leave the
    result where the next loop looks for it, so gradient flows through all loops, and up to six spare loops have to
    preserve the answer. There is no prelude and no coda, which could do the first or last step by themselves and spare
    the loop from learning it. Of its two layers, the first finds what the second needs, the same in every loop.
    """
    cfg = _reasoner(
        task, difficulties, loops=loops, steps=2000, window=window, local_share=0.5, lr=1e-3, options=options, dim=96,
        gate=gate, batch_size=32, evaluation=evaluation,
    )  # fmt: skip
    cfg.model.n_heads = cfg.model.n_kv_heads = 2
    cfg.model.rope_theta, cfg.model.rope_context = 1e16, 200
    cfg.model.core_layers, cfg.model.expert_dim = 2, 256
    cfg.task.growth, cfg.loss.depth = 0.95, "steps"
    cfg.loops = LoopConfig("by_steps", minimum=1, maximum=loops, spare=6, gradient="all")
    cfg.optim.decay, cfg.gate.steps = 0.6, 400  # a long decay: answers become exact at low rates
    return cfg


def _reasoner(
    task: str, difficulties: range, *, loops: int, steps: int, evaluation: EvalConfig,
    options: dict[str, Any] | None = None, dim: int = 64, prelude: int = 0, coda: int = 0, window: int = 4,
    taps: int = 3, local_share: float = 1.0, lr: float = 5e-4, gate: tuple[int, int] = (0, 0), stale: float = 0.0,
    batch_size: int = 64,
) -> TrainConfig:  # fmt: skip
    """The common config: one dense block, looped 1 to ``loops`` times at random.

    ``local_share`` of the heads see only ``window`` tokens. With 2, information moves one token per loop, which
    generalizes to any length. ``gate`` is the maximum difficulty and the loops of the halting gate's training, 0 for
    those of the model. ``stale`` is the share of a batch that starts from states of other problems.
    """
    options = options or {}
    model = MythosConfig(
        vocab_size=tasks.load(task, **options).vocab_size, dim=dim, n_heads=4, n_kv_heads=4, max_seq_len=4096,
        max_loop_iters=loops, prelude_layers=prelude, coda_layers=coda, attn_type="gqa", rope_theta=1e4,
        n_experts=1, n_shared_experts=0, n_experts_per_tok=1, expert_dim=2 * dim, lora_rank=0,
        local_window=window, conv_taps=min(window, taps), local_share=local_share, halting=False, warm_start=False,
    )  # fmt: skip
    return TrainConfig(
        model=model, task=TaskConfig(task, options, difficulties[0], difficulties[-1]),
        loops=LoopConfig("uniform", minimum=1, maximum=loops, gradient="last", grad_loops=6, stale=stale),
        optim=OptimConfig(lr=lr), gate=GateConfig(max_difficulty=gate[0], loops=gate[1]), evaluation=evaluation,
        steps=steps, batch_size=batch_size,
    )  # fmt: skip
