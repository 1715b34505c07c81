"""Tokenisation of text into the folders of :mod:`open_mythos.tasks.store`, by one process or several."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import chain, islice
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from open_mythos import files
from open_mythos.fields import must
from open_mythos.install import cache_dir
from open_mythos.tasks import corpus, store, tokenizer
from open_mythos.tasks.store import AGAIN, PARTS, Part, Shard, Store, checksum, identity, is_store, read_index, total
from open_mythos.tasks.tokenizer import Tokenizer

SHARD = 1 << 26  # a shard ends after so many tokens, counting both parts
_TRAINED_ON = 1 << 24  # characters of text that a tokenizer is trained on
_AT_ONCE = 1 << 20  # characters that are tokenised together

Encoded = list[tuple[str, np.ndarray, int]]
"""For each document: its part, its tokens with ``<eos>``, and its number of bytes."""


def tokenised(source: str, kind: str, max_bytes: int) -> Store:
    """The tokens of a text, cached on disk; if ``source`` is a folder of tokens, these.

    One document in 16 is held out, by a hash of its content, or the last one if that holds out none.

    Args:
        source, max_bytes: see :func:`open_mythos.tasks.corpus.stream`; a folder of tokens is not cut.
        kind: see :func:`open_mythos.tasks.tokenizer.tokenizer`; it needs a token that ends documents.

    Raises:
        ValueError: for a source without two documents, or a tokenizer without a token that ends them.
        ImportError: naming the extra to install, if a source or tokenizer needs a package that is not installed.
        OSError: if the disk is full.
    """
    if is_store(source := os.path.expanduser(source)):
        return _of_kind(store.opened(Path(source)), kind)
    key = [2, source, corpus.state(source), _state(kind), max_bytes]
    home = cache_dir() / "text" / hashlib.blake2b(json.dumps(key).encode(), digest_size=12).hexdigest()
    try:
        _adopt(home)
        return store.opened(home)
    except (OSError, ValueError):  # missing or damaged
        shutil.rmtree(home, ignore_errors=True)
        home.parent.mkdir(parents=True, exist_ok=True)
        # Made under another name and renamed once complete, so that no process reads half of it.
        with tempfile.TemporaryDirectory(dir=home.parent, prefix="making-", ignore_cleanup_errors=True) as making:
            try:
                fill(Path(making, "tokens"), [source], kind, max_bytes)
            except OSError as error:
                raise error if error.filename else OSError(error.errno, error.strerror, str(home)) from error
            with contextlib.suppress(OSError):  # it exists: another process was first
                Path(making, "tokens").rename(home)
    return store.opened(home)


def fill(
    folder: Path, sources: Sequence[str], kind: str, max_bytes: int = 0, workers: int = 0,
    tell: Callable[[int], None] = lambda done: None,
) -> int:  # fmt: skip
    """Tokenise texts, one after the other, into a folder that :func:`~open_mythos.tasks.store.opened` opens.

    The shards do not depend on the number of workers. If an earlier call for the same texts and tokenizer was
    interrupted, its folder is resumed after the last complete shard; any other folder is emptied.

    Args:
        folder: to write to, under a temporary name, so that an incomplete folder is never taken for a complete one.
        sources, max_bytes: see :func:`open_mythos.tasks.corpus.stream`; the limit is for each.
        kind: see :func:`open_mythos.tasks.tokenizer.tokenizer`; it needs a token that ends documents.
        workers: processes that tokenise; 0: this one.
        tell: called with the bytes of text done so far, first with those of an earlier call.

    Returns:
        The bytes of text that an earlier call had done.

    Raises:
        ValueError, ImportError, OSError: as :func:`~open_mythos.tasks.store.tokenised`.
    """
    key = [sources, [corpus.state(source) for source in sources], max_bytes, _state(kind)]
    made_from = hashlib.blake2b(json.dumps(key).encode(), digest_size=12).hexdigest()
    index = _left(folder, made_from)
    if index is None:
        made = tokenizer.tokenizer(kind, _to_train_on(sources, max_bytes), ends=True)
        must(made.eos is not None, f"tokenizer={kind!r} has no end-of-document token; name it <eos>, or set eos_token")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        made.save(folder)
        index = {"from": made_from, "tokenizer": identity(made), "eos": made.eos, "dtype": made.dtype.__name__}
        index |= {name: list[Shard]() for name in PARTS}
    done = total([total(index[name]) for name in PARTS])
    before = done.bytes
    tell(before)
    texts = chain.from_iterable(corpus.stream(source, max_bytes) for source in sources)
    batches = _encoded(islice(texts, done.documents, None), folder, index["eos"], workers)
    with contextlib.closing(batches):
        while _write_shard(folder, index, batches, tell):
            store.write_index(folder, index)
    for name in PARTS:
        if not total(index[name]).documents:
            shutil.rmtree(folder)  # resuming it would fail in the same way
            raise ValueError(f"source={','.join(sources)!r} has too few documents for its {name} part; use more text")
    return before


def _state(kind: str) -> str:
    """What tells one tokenizer from another: its name, or all that its folder says."""
    present = [file for file in (Path(kind, tokenizer.FILE), Path(kind, tokenizer.CONFIG)) if file.is_file()]
    return "".join(files.read_text(file) for file in present) or kind


def _of_kind(found: Store, kind: str) -> Store:
    """``found``, if its tokenizer is ``kind``; else ValueError."""
    if files.real(Path(kind)) != files.real(found.folder):
        known = not kind.startswith("bpe:") and identity(tokenizer.tokenizer(kind, (), ends=True))
        other = f"{found.folder} was not tokenised by {kind!r}; use tokenizer={found.folder}"
        must(known == identity(found.tokenizer), f"{other}, or {AGAIN}")
    return found


def _adopt(home: Path) -> None:
    """Add the present index to a folder of earlier versions, which has one file per part and ``index.json``."""
    if is_store(home) or not (home / "index.json").is_file():
        return
    names = [field.name for field in fields(Part)]
    old, made = (
        files.read_json(home / "index.json", {name: dict.fromkeys(names, int) for name in PARTS}),
        tokenizer.load(home),
    )
    must(made.eos is not None, f"{home} does not name an end-of-document token")
    store.write_index(home, {
        "from": "", "tokenizer": identity(made), "eos": made.eos, "dtype": made.dtype.__name__,
        **{part: [Shard(**{name: old[part][name] for name in names}, file=f"{part}.bin")] for part in PARTS},
    })  # fmt: skip


def _left(folder: Path, made_from: str) -> dict[str, Any] | None:
    """The index of an earlier, interrupted call of the same, or None; its partial files are removed."""
    try:
        index = read_index(folder)
    except (OSError, ValueError):
        return None
    for path in filter(files.is_partial, folder.iterdir()):
        path.unlink()
    return index if index["from"] == made_from else None


def _write_shard(folder: Path, index: dict[str, Any], batches: Iterator[Encoded], tell: Callable[[int], None]) -> bool:
    """Write the next shard of both parts, and add it to the index; False if there was nothing left to write.

    It ends after a batch, and not before a document is held out: if the text has none, its last document is held out.
    """
    end = np.array([index["eos"]], index["dtype"])
    before = {name: total(index[name]) for name in PARTS}
    number = 1 + max((int(shard.file[-9:-4]) for name in PARTS for shard in index[name]), default=-1)
    now = {name: Shard(file=f"{name}-{number:05d}.bin") for name in PARTS}
    nobody_yet, waiting = before["held_out"].documents == 0, list[tuple[np.ndarray, int]]()

    def write(name: str, tokens: np.ndarray, size: int) -> None:
        tokens = tokens if before[name].tokens + now[name].tokens else np.concatenate([end, tokens])
        opened[name].write(tokens.astype(tokens.dtype.newbyteorder("<")).data)
        now[name].documents, now[name].bytes = now[name].documents + 1, now[name].bytes + size
        now[name].tokens += len(tokens)

    with contextlib.ExitStack() as stack:
        paths = {name: stack.enter_context(files.replacing(folder / now[name].file)) for name in PARTS}
        opened = {name: stack.enter_context(path.open("wb")) for name, path in paths.items()}
        is_over = True
        for batch in batches:
            for name, tokens, size in batch:
                if waiting:
                    write("train", *waiting.pop())
                if nobody_yet and name == "train":
                    waiting.append((tokens, size))
                else:
                    nobody_yet = False
                    write(name, tokens, size)
            tell(sum(part.bytes for part in (*before.values(), *now.values())))
            if not nobody_yet and sum(shard.tokens for shard in now.values()) >= SHARD:
                is_over = False
                break
        if waiting:
            write("held_out", *waiting.pop())
    for name, shard in now.items():
        if shard.tokens:
            shard.crc32 = checksum(folder / shard.file, before[name].crc32)
            index[name].append(shard)
        else:
            (folder / shard.file).unlink()
    return not is_over or any(shard.tokens for shard in now.values())


def _encoded(documents: Iterator[str], folder: Path, eos: int, workers: int) -> Generator[Encoded]:
    """Batches of documents in order, tokenised by ``workers`` processes."""
    batches = _batches(documents)
    if not workers:
        encode = _encoder(folder, eos)
        yield from map(encode, batches)
        return
    ways = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if "forkserver" in ways else "spawn")
    context.set_forkserver_preload([__name__])  # imported once, for all of them
    with contextlib.ExitStack() as stack:
        free, busy, done = deque[Any](), dict[Any, int](), dict[int, Encoded]()
        for _ in range(workers):
            mine, others = context.Pipe()
            process = context.Process(target=_work, args=(others, folder, eos), daemon=True)
            process.start()
            others.close()
            stack.callback(process.join)
            stack.callback(mine.close)  # ends the process
            free.append(mine)
        sent, given, batch = 0, 0, next(batches, None)
        while batch is not None or busy:
            while batch is not None and free and sent < given + 4 * workers:  # limits results kept behind a slow batch
                pipe = free.popleft()
                _send(pipe, batch)
                busy[pipe], sent, batch = sent, sent + 1, next(batches, None)
            for pipe in connection.wait(busy):
                done[busy.pop(pipe)] = _answer(pipe)
                free.append(pipe)
            while given in done:
                yield done.pop(given)
                given += 1


def _answer(pipe: Any) -> Encoded:
    try:
        found = pipe.recv()
    except (EOFError, OSError):
        raise _ended() from None
    if isinstance(found, Exception):
        raise found
    return found


def _send(pipe: Connection, batch: list[str]) -> None:
    try:
        pipe.send(batch)
    except OSError:
        raise _ended() from None


def _ended() -> MemoryError:
    return MemoryError(
        "a tokenising process was killed, perhaps for lack of memory; the same command continues its work"
    )


def _work(pipe: Connection, folder: Path, eos: int) -> None:
    """Main function of a worker process: encode batches until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the writing process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per worker process
    with contextlib.suppress(EOFError, OSError):
        encode = _encoder(folder, eos)
        while True:
            batch = pipe.recv()
            try:
                found: Any = encode(batch)
            except Exception as error:
                found = error
            pipe.send(found)


def _encoder(folder: Path, eos: int) -> Callable[[Sequence[str]], Encoded]:
    made: Tokenizer = tokenizer.load(folder)
    end = np.array([eos], made.dtype)

    def encode(batch: Sequence[str]) -> Encoded:
        return [
            ("held_out" if corpus.held_out(text) else "train", np.concatenate([tokens, end]), len(text.encode()))
            for text, tokens in zip(batch, made.encode_each(batch), strict=True)
        ]

    return encode


def _to_train_on(sources: Iterable[str], max_bytes: int) -> Iterator[str]:
    left = _TRAINED_ON
    for document in chain.from_iterable(corpus.stream(source, max_bytes) for source in sources):
        if not corpus.held_out(document):
            yield document
            left -= len(document)
            if left <= 0:
                return


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch, size = list[str](), 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
