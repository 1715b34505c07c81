"""``mythos retrofit``: convert a pretrained decoder to a recurrent-depth model, and verify its logits."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from open_mythos.cli.console import console, fail, mythos, note, progress, table
from open_mythos.fields import must

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE = (
    "A river does not hurry, and yet it arrives. In spring the snow of the mountains melts, and what was white and "
    "silent becomes brown and loud; by summer the water is clear again, and children count the stones on its bed. "
    "17 + 25 = 42, they say, and then: def total(stones): return sum(stones.values())"
)


def retrofit(
    source: Annotated[
        str, typer.Argument(help="A Llama model: a directory, a GGUF file, or a name on the Hugging Face Hub.")
    ],
    prelude: Annotated[int, typer.Option(help="Number of first layers, run once.")] = 4,
    core: Annotated[int, typer.Option(help="Number of layers before the coda, looped.")] = 8,
    coda: Annotated[int, typer.Option(help="Number of last layers, run once.")] = 4,
    loops: Annotated[int, typer.Option(min=1, help="Default number of loops, and the most that are compared.")] = 4,
    decay: Annotated[
        float, typer.Option(help="Weight of the state in each loop's input; the rest is the embedding's.")
    ] = 0.5,
    text: Annotated[
        Path | None, typer.Option(help="Text file to compare on, instead of a few built-in sentences.")
    ] = None,
    out: Annotated[Path | None, typer.Option(file_okay=False, help="Output directory; default: runs/retrofit.")] = None,
) -> None:
    """Convert a pretrained decoder to a recurrent-depth model: layers become prelude, core and coda."""
    import torch

    from open_mythos.cli.owned import may_replace_model
    from open_mythos.files import read_text
    from open_mythos.integrations import retrofit as surgery
    from open_mythos.integrations.original import load_original

    must(0 < decay < 1, f"--decay {decay}; give a number between 0 and 1")
    directory = out or Path("runs") / "retrofit"
    with progress(4) as begin:
        split = surgery.Split(prelude, core, coda)
        sample = SAMPLE if text is None else read_text(text)
        may_replace_model(directory, is_agreed=out is None)
        begin("loading the original")
        original, tokenizer = load_original(source)
        n_layers = len(original.model.layers)
        begin("surgery")
        model = surgery.retrofit(original, split, loops, decay)
        ids = tokenizer(sample, return_tensors="pt").input_ids[:, : min(512, model.cfg.max_seq_len)]
        must(ids.shape[1] > 1, f"--text {text} holds {ids.shape[1]} tokens; give a text of at least two")
        begin("comparing")
        rows = {f"the original, {n_layers} layers": bits(surgery.logits_of(original, ids), ids, tokenizer)}
        surgery.truncate(original, split)
        logits = surgery.logits_of(original, ids)
        error = surgery.difference(model, logits, ids)
        rows[f"its {prelude + core + coda} layers that were kept"] = bits(logits, ids, tokenizer)
        for n_loops in sorted({loops, *(2**i for i in range(loops.bit_length()))}):
            with torch.no_grad():
                rows[f"the new model, {n_loops} loop{'s' * (n_loops > 1)}"] = bits(model(ids, n_loops), ids, tokenizer)
        if not error <= surgery.TOLERANCE:
            fail(f"logits differ by {error:.1e} of the largest, above {surgery.TOLERANCE:g}; nothing was written")
        begin("saving")
        surgery.save(model, tokenizer, directory, original.generation_config)
    spans = split.layers(n_layers)
    layers = {"prelude": spans[0], "dropped": range(spans[0].stop, spans[1].start), "core": spans[1], "coda": spans[2]}
    run = {"prelude": "once", "dropped": "never", "core": "in each loop", "coda": "once"}
    parts = ((part, f"{span.start + 1} to {span.stop}", run[part]) for part, span in layers.items() if span)
    console.print(table("layers of the original", "part", "layers", "run", rows=parts))
    shown = ((name, f"{value:.3f}") for name, value in rows.items())
    console.print(table(f"bits per byte of {ids.shape[1]} tokens", "", "bits", rows=shown))
    largest = float(logits.abs().max())
    original_layers = "the original" if prelude + core + coda == n_layers else "the layers that were kept"
    note(
        f"At one loop its logits are those of {original_layers}: they differ by at most "
        f"{error * max(1.0, largest):.1e}, at a largest logit of {largest:.0f}.",
        f"Model and tokenizer: {directory}",
        f"Next: train it to use its loops with {mythos('train', 'heal', f'start={directory}')}.",
    )


def bits(logits: "Tensor", ids: "Tensor", tokenizer: object) -> float:
    """Bits per byte of the text, without the first token."""
    import torch.nn.functional as F

    nats = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
    n_bytes = len(tokenizer.decode(ids[0, 1:]).encode())  # type: ignore[attr-defined]
    return float(nats) / math.log(2) / n_bytes
