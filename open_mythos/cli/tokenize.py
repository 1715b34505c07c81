"""``mythos tokenize``: tokenise text into a folder of shards, by several processes."""

import os
import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

from open_mythos.cli.console import live, mythos, note, si, typed
from open_mythos.fields import must

WORTH = 1 << 24  # bytes of text from which on one more process pays off


def tokenize(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE...", help="Files, folders, globs, hf:NAME[:CONFIG], or stdlib.")
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="Output folder for the tokens.")] = Path("tokens"),
    tokenizer: Annotated[
        str, typer.Option(help="bytes; bpe:N, trained on the text with N tokens; or a folder with a tokenizer.json.")
    ] = "bytes",
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Number of processes; default: one per core, if there is enough text."),
    ] = None,
    max_bytes: Annotated[
        int, typer.Option(min=0, help="Bytes to read of each source; 0: all, or the first 64 MB of a dataset.")
    ] = 0,
) -> None:
    """Tokenise text once, in parallel, to train on it many times."""
    from open_mythos import files
    from open_mythos.cli.watch import log
    from open_mythos.tasks import corpus, store
    from open_mythos.tasks.filling import fill
    from open_mythos.training.owner import owned

    out = files.real(out) if out.is_symlink() or not out.name else out  # a folder cannot replace a link
    is_free = not out.exists() or not any(out.iterdir())
    whole = f"train on it with {typed('train', 'text', f'data={out}')}, or " if store.is_store(out) else ""
    must(is_free, f"{out} exists and is not overwritten; {whole}give another --out")
    for source in sources:
        is_text = source == "stdlib" or not store.is_store(source)
        inside = os.path.isdir(source) and files.real(out).is_relative_to(files.real(Path(source)))
        must(not inside, f"--out {out} lies in {source}, where it would be read as text; give another --out")
        must(is_text, f"{source} already holds tokens; train on it with {typed('train', 'text', f'data={source}')}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    total, half = (
        sum(corpus.size(source, max_bytes) for source in sources),
        out.with_name(f".{out.name}{files.PARTIAL}"),
    )
    workers = workers or min(cores, 1 + total // WORTH)
    if workers == 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    started = begun = time.perf_counter()

    with owned(half, log), live(total, f"reading {' '.join(sources)}") as update:

        def tell(done: int) -> None:
            nonlocal begun
            begun = begun if begun > started else time.perf_counter()
            update(f"{si(done, 'B')} of {si(max(done, total), 'B')} tokenised", done, max(done, total))

        try:
            before = fill(half, sources, tokenizer, max_bytes, workers if workers > 1 else 0, tell)
        except BaseException as error:
            if any(half.glob("*.bin")):
                log(f"stopped; the finished part is in {half}, and the same command continues from there")
            elif isinstance(error, ValueError | ImportError):
                shutil.rmtree(half, ignore_errors=True)
            raise
        seconds = time.perf_counter() - begun
    os.replace(half, out)
    files.sync(out.parent)
    made = store.opened(out, read_through=0)
    train, held_out = made.parts["train"], made.parts["held_out"]
    tokens, size = train.tokens + held_out.tokens, train.bytes + held_out.bytes
    n_shards, share = sum(len(one.shards) for one in made.tokens.values()), (size - before) / size
    rates = f"{si(share * size / seconds, 'B')}/s, {si(share * tokens / seconds)} tokens/s by {workers} processes"
    again = f", {si(before, 'B')} of it before" if before else ""
    note(
        f"{out}: {tokens:,} tokens of {size:,} bytes{again}, in {n_shards} shards; {train.documents:,} documents to "
        f"train on, held out: {held_out.documents:,}",
        f"{seconds:.1f} s: {rates if workers > 1 else rates[:-2]}",
        f"Next: {mythos('train', 'text', f'data={out}')}.",
    )
