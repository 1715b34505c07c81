"""``mythos diagnose``: one traced forward pass through a checkpoint, as tables and pictures."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from open_mythos import files
from open_mythos.cli.console import console, mythos, note, progress, si, table
from open_mythos.config import MythosConfig
from open_mythos.fields import must

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from open_mythos.diagnostics import Trace
    from open_mythos.tasks import Task

EXAMPLE_FILE = "example.json"
PICTURES = "state_change.png", "loops_used.png", "halting.png", "expert_load.png"
RANDOM_TOKENS, SEED = 64, 0
POSITIONS_PER_LINE = 16
BLOCKS, MOST_BLOCKS = " ▁▂▃▄▅▆▇█", 32


def diagnose(
    checkpoint: Annotated[str, typer.Argument(help="A run, a model's directory, or the name of a shipped model.")],
    loops: Annotated[int | None, typer.Option(min=1, help="Number of loops; default: the model's.")] = None,
    plots: Annotated[Path | None, typer.Option(file_okay=False, help="Directory for plots (needs matplotlib).")] = None,
    prompt: Annotated[str | None, typer.Option(help='Token ids, as in "1 2 1 1".')] = None,
) -> None:
    """Look inside a checkpoint, loop by loop."""
    import torch

    from open_mythos import plots as draw
    from open_mythos.cache import KVCache
    from open_mythos.cli.owned import may_replace
    from open_mythos.diagnostics import cache_bytes, loop_gain, spectral_radius, trace
    from open_mythos.model import UnrolledMythos
    from open_mythos.models import load_model, model_dir

    with progress(n_steps=3 if plots is None else 4) as begin, torch.no_grad():
        may_replace(*(plots / name for name in PICTURES if plots is not None))
        begin("loading")
        model = load_model(checkpoint)
        source, ids = choose_tokens(model.cfg, model_dir(checkpoint), prompt)
        begin("tracing")
        found = trace(model, ids, loops)
        begin("measuring")
        n_loops, cache = len(found.delta), KVCache()
        model(ids, n_loops, kv_cache=cache)
        radius, n_bytes = spectral_radius(model), cache_bytes(cache)
        loops_on = not isinstance(model, UnrolledMythos)  # whose depth is fixed, so that no further loop can be run
        gain = loop_gain(model, ids, n_loops) if loops_on else math.nan
        if plots is not None:
            begin("drawing")
            words, used = symbols(model_dir(checkpoint), ids[0].tolist()), found.loops_used[0]
            draw.state_change(found.delta, plots / "state_change.png")
            if model.cfg.halting:  # else all loops are run, and the gate is untrained
                draw.halting_map(used, plots / "loops_used.png", words)
                draw.halting_map(found.halting[:, 0].float(), plots / "halting.png", words, used)
            if model.cfg.n_experts > 1:
                draw.expert_load(found.expert_load, plots / "expert_load.png")
    gate = f"gate on, threshold {model.cfg.act_threshold:g}" if model.cfg.halting else "no early exit"
    console.print(f"{checkpoint}: {n_loops} loops over {ids.shape[1]} tokens ({source}), {gate}")
    rows = [
        ("spectral radius of A", f"{radius:.4f}", "always below 1: the linear part of the loop is stable"),
        ("gain of one more loop", f"{gain:.4f}", f"the state {'converges' if gain < 1 else 'keeps changing'}"),
        ("cache", si(n_bytes, "B"), f"measured; {si(n_bytes / ids.shape[1], 'B')} per token"),
    ]
    rows = rows if loops_on else rows[::2] if radius < 1 else rows[2:]
    console.print(table("the loop as a whole", "measure", "value", "reading", rows=rows, left="reading"))
    show_loops(found, model.cfg.halting)
    show_halting(found.loops_used[0].tolist())
    if model.cfg.n_experts > 1:
        show_experts(found.expert_load)
    if plots is not None:
        console.print(f"Plots are in {plots}.")
    deeper = mythos("diagnose", checkpoint, "--loops", 2 * model.cfg.max_loop_iters)
    then = f"run more loops with {deeper}" if loops_on else f"measure it with {mythos('eval', checkpoint)}"
    note(f"Next: {then}{'' if plots else ', or add --plots DIRECTORY for plots'}.")


def choose_tokens(cfg: MythosConfig, checkpoint: Path, prompt: str | None) -> tuple[str, "Tensor"]:
    """The tokens (1, T), and words that say where they are from: the prompt, the checkpoint's example, a problem of its
    training task, or random ones. Returned as (source, tokens)."""
    import torch

    example = checkpoint / EXAMPLE_FILE
    if prompt is not None:
        words = prompt.replace(",", " ").split()
        source, place = "prompt", "--prompt"
        tokens = [int(word) if word.removeprefix("-").isdecimal() else word for word in words]
    elif example.is_file():
        source, place, tokens = EXAMPLE_FILE, str(example), read_example(example)
    elif (task := task_of(checkpoint)) is not None:
        source, place = f"a problem of {task[0].name}, seed {SEED}", "the task"
        tokens = task[0].batch(1, task[1], torch.Generator().manual_seed(SEED)).ids[0].tolist()
    else:
        length, generator = min(RANDOM_TOKENS, cfg.max_seq_len), torch.Generator().manual_seed(SEED)
        return f"random, seed {SEED}", torch.randint(cfg.vocab_size, (1, length), generator=generator)
    high = cfg.vocab_size - 1
    must(len(tokens) > 0, f"{place} contains no tokens; give integers from 0 to {high}, such as '1 2 1 1'")
    for token in tokens:
        valid = isinstance(token, int) and not isinstance(token, bool) and 0 <= token <= high
        must(valid, f"{place} holds {token!r}; token ids of this model are integers from 0 to {high}")
    return source, torch.tensor([tokens])


def task_of(checkpoint: Path) -> "tuple[Task, int] | None":
    """The task that the model was trained on, and its maximum difficulty in training; None if unknown, or for text."""
    from open_mythos import tasks
    from open_mythos.models import TRAINING_FILE
    from open_mythos.training.runs import held_out_options, training_config

    if not (checkpoint / TRAINING_FILE).is_file() or (cfg := training_config(checkpoint)).task.name == "text":
        return None
    options = cfg.task.options | held_out_options(checkpoint, cfg)
    return tasks.load(cfg.task.name, **options), cfg.task.max_difficulty


def symbols(checkpoint: Path, ids: list[int]) -> list[str]:
    """The tokens as text, by the model's tokenizer or its task's vocabulary; their ids if neither is known."""
    from open_mythos.models import TOKENIZER_FILES, tokenizer_of

    if (checkpoint / TOKENIZER_FILES[0]).is_file():
        words = tokenizer_of(checkpoint)
        return [ascii(words.decode([i]))[1:-1].replace(" ", "␣") or str(i) for i in ids]
    known = [] if (task := task_of(checkpoint)) is None else task[0].vocab
    return [known[i] if i < len(known) else str(i) for i in ids]


def read_example(path: Path) -> list[Any]:
    try:
        return files.read_json(files.own(path), {"tokens": list})["tokens"]
    except ValueError as error:
        raise ValueError(f'{error}; it should hold {{"tokens": [...]}}: fix or remove it, or give --prompt') from error


def show_loops(found: "Trace", halting: bool) -> None:
    columns = "loop", "running", "mean", "max", *(["gate, mean"] if halting else [])
    shown = table("state change |Δh| / |h| of running positions", *columns)
    for loop, (delta, gate) in enumerate(zip(found.delta, found.halting, strict=True), start=1):
        ran = found.loops_used >= loop
        values = (delta[ran].mean(), delta.max(), gate[ran].float().mean())[: len(columns) - 2]
        shown.add_row(str(loop), str(int(ran.sum())), *(f"{x:.4f}" if ran.any() else "-" for x in values))
    console.print(shown)


def show_halting(loops_used: list[int]) -> None:
    shown = table("loops used by each position", "positions", "loops", left="loops")
    width = len(str(max(loops_used)))
    for start in range(0, len(loops_used), POSITIONS_PER_LINE):
        line = loops_used[start : start + POSITIONS_PER_LINE]
        shown.add_row(f"{start}-{start + len(line) - 1}", " ".join(f"{used:{width}}" for used in line))
    console.print(shown)


def show_experts(load: "Tensor") -> None:
    n_experts = load.shape[1]
    title = f"load of {n_experts} experts (even: {1 / n_experts:.1%})"
    shown = table(title, "loop", "busiest", "idlest", "unused", "load", left="load")
    for loop, counts in enumerate(load, start=1):
        share = counts / counts.sum().clamp(min=1)
        unused = str(int((counts == 0).sum()))
        shown.add_row(str(loop), f"{share.max():.1%}", f"{share.min():.1%}", unused, bars(counts.numpy()))
    console.print(shown)


def bars(counts: "np.ndarray") -> str:
    """Counts as block characters of eight heights; neighbours are averaged if there are more than ``MOST_BLOCKS``."""
    import numpy as np

    means = [part.mean() for part in np.array_split(counts, min(len(counts), MOST_BLOCKS))]
    return "".join(BLOCKS[round(8 * mean / max(*means, 1))] for mean in means)
