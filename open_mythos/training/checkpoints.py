"""Atomic, checksummed checkpoints of a run, one folder each; every process writes its shards.

::

    step_XXXXXXXX/manifest.json             sizes and checksums of the other files, written last
    step_XXXXXXXX/state.pt                  the state, as plain values and tensors; for tensors that several processes
                                            divide, an index of their pieces
    step_XXXXXXXX/pieces_NNNNN.safetensors  the pieces that process NNNNN wrote

The index says where in the whole tensor each piece lies, so any slice can be read from the pieces that overlap it: a
run resumes with any number of processes and any layout. The format is not that of torch.distributed.checkpoint, whose
index is a pickle: loading a folder from an untrusted source must not run code.
"""

import contextlib
import io
import os
import pickle
import re
import shutil
import threading
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from open_mythos import files, weights
from open_mythos.training import distributed
from open_mythos.weights import CheckpointError

STATE_FILE, MANIFEST_FILE = "state.pt", "manifest.json"
_LISTED = {"bytes": int, "crc32": int}
_MANIFEST = {"files": {STATE_FILE: _LISTED, "*": _LISTED}, "seconds?": float}
_INDEX = [{"path": [(str, int)], "shape": [int], "at": [{"file": str, "start": [int], "size": [int]}]}]
_PIECES = "pieces"  # key of the index of divided tensors in a state, and prefix of their files
_PREFIX, _PARTIAL = "step_", ".partial"
_NAME = re.compile(_PREFIX + r"\d{8,}")
_UNREADABLE = (RuntimeError, EOFError, ValueError, LookupError, TypeError)
_CHUNK = 1 << 22  # bytes that are read at a time

T = TypeVar("T")
Place = tuple[str | int, ...]  # path to a value in a state: keys of dicts and indices of lists


@dataclass(frozen=True)
class Part:
    """The shard that this process holds of a tensor that several processes divide.

    Attributes:
        held: the shard.
        shape: of the whole tensor.
        start: offset of ``held`` in the whole, on each axis.
        is_mine: whether this process writes it: of the processes that hold the same shard, one does.
    """

    held: Tensor
    shape: tuple[int, ...]
    start: tuple[int, ...]
    is_mine: bool


class Stored:
    """A tensor in pieces on disk. Indexed with a slice for each axis, or () for all, it reads that part, on the CPU.

    Raises:
        CheckpointError: if the pieces do not cover the part, or there are none.
    """

    def __init__(self, folder: Path, path: list[str | int], shape: list[int], at: list[dict[str, Any]]) -> None:
        self.name, self.shape, self.ndim = _name(tuple(path)), torch.Size(shape), len(shape)
        self.at = [(files.inside(folder, one["file"], str(folder)), one["start"], one["size"]) for one in at]

    @cached_property
    def dtype(self) -> torch.dtype:
        if not self.at:
            raise CheckpointError(f"no file contains any part of {self.name}")
        with weights.opened(self.at[0][0]) as file:
            return (file.get_slice(self.name)[:0] if self.ndim else file.get_tensor(self.name)).dtype

    def __getitem__(self, where: tuple[slice, ...]) -> Tensor:
        wanted = [range(n)[part] for n, part in zip(self.shape, where or (slice(None),) * self.ndim, strict=True)]
        found = list[tuple[tuple[slice, ...], Tensor]]()
        for path, start, size in self.at:
            both = [range(max(w.start, s), min(w.stop, s + n)) for w, s, n in zip(wanted, start, size, strict=True)]
            if not all(both):
                continue
            inside = tuple(slice(r.start - s, r.stop - s) for r, s in zip(both, start, strict=True))
            place = tuple(slice(r.start - w.start, r.stop - w.start) for r, w in zip(both, wanted, strict=True))
            with weights.opened(path) as file:
                found.append((place, file.get_slice(self.name)[inside] if inside else file.get_tensor(self.name)))
        if sum(part.numel() for _, part in found) != prod(map(len, wanted)):
            paths = ", ".join(sorted({str(path) for path, *_ in self.at}))
            raise CheckpointError(f"{self.name} is incomplete in {paths}")
        whole = torch.empty([len(w) for w in wanted], dtype=found[0][1].dtype if found else None)
        for place, part in found:
            whole[place] = part
        return whole


Parts = dict[Place, Part]


def save(
    directory: Path, step: int, state: dict[str, Any], keep: int | None, hours: float = 0.0, group: Any = None
) -> Path:
    """Write ``directory/step_XXXXXXXX`` atomically, then remove older ones; to be called by all processes.

    Kept are the newest ``keep`` (at least 1; None: all), and the first one of every ``hours`` of training. Checkpoints
    of later steps are removed: they are of an earlier attempt, and the run was resumed from before them.

    Files are written and fsynced in a temporary directory, the manifest with sizes and checksums last, which the first
    process then renames. On failure it is removed, and older checkpoints stay.

    Args:
        directory, step, keep, hours: as above.
        state: tensors, plain values and :class:`Part`; of all but parts, that of the first process is written.
        group: process group to synchronise in; None: the default one.

    Raises:
        OSError: in all processes, if one cannot write.
    """
    final = directory / f"{_PREFIX}{step:08d}"
    partial, is_first = final.with_name(final.name + _PARTIAL), distributed.rank() == 0
    plain, parts = _apart(state)
    try:
        _together(lambda: _begin(partial) if is_first else None, group)
        written = _together(lambda: _write_pieces(partial, parts), group)
        _together(lambda: _finish(partial, final, step, plain, written) if is_first else None, group)
    except OSError:
        if is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if is_first:
        _rotate(final, keep, hours)
    return final


def _begin(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(exist_ok=True)  # not the run's folder: if its disk is unmounted, it must not be made elsewhere
    partial.mkdir()


def _write_pieces(partial: Path, parts: Parts) -> tuple[str, dict[str, int], list[Any]]:
    """Write this process's parts; returns the file's name, its entry in the manifest, and those of the index."""
    mine = {path: part for path, part in parts.items() if part.is_mine and part.held.numel()}
    if not mine:
        return "", {}, []
    file = partial / f"{_PIECES}_{distributed.rank():05d}.safetensors"
    weights.write(file, {_name(path): part.held for path, part in mine.items()})
    places = [(path, list(part.shape), list(part.start), list(part.held.shape)) for path, part in mine.items()]
    return file.name, {"bytes": file.stat().st_size, "crc32": _checksum(file)}, places


def _finish(partial: Path, final: Path, step: int, plain: dict[str, Any], written: list[Any]) -> None:
    """Write state, index and manifest, and rename the folder to its final name."""
    listed, index = dict[str, dict[str, int]](), dict[Any, dict[str, Any]]()
    for name, said, places in written:
        if name and not ((partial / name).is_file() and (partial / name).stat().st_size == said["bytes"]):
            raise OSError(f"{partial / name} was written where process 0 cannot see it; use a shared file system")
        listed |= {name: said} if name else {}
        for path, shape, start, size in places:
            of_tensor = index.setdefault(path, {"path": list(path), "shape": shape, "at": []})
            of_tensor["at"].append({"file": name, "start": start, "size": size})
    buffer = io.BytesIO()  # torch.save to a file reports a full disk as a zip error
    torch.save(plain | ({_PIECES: list(index.values())} if index else {}), buffer)
    content = buffer.getbuffer()
    files.write(partial / STATE_FILE, content)
    listed[STATE_FILE] = {"bytes": len(content), "crc32": zlib.crc32(content)}
    seconds = plain.get("meter", {}).get("seconds", 0.0)
    files.write_json(partial / MANIFEST_FILE, {"step": step, "seconds": seconds, "files": listed})
    shutil.rmtree(final, ignore_errors=True)  # exists only if it was damaged
    os.replace(partial, final)
    files.sync(final.parent)


def _rotate(final: Path, keep: int | None, hours: float) -> None:
    """Remove checkpoints beside ``final`` that are not to be kept, and partial ones that a crash has left."""
    directory, last, lasting = final.parent, None, set[Path]()
    found = newest_first(directory)
    later, kept = [path for path in found if path > final], [path for path in found if path <= final]
    for path in reversed(kept) if hours else ():
        with contextlib.suppress(OSError, ValueError):  # damaged: it is kept only if among the newest
            manifest = files.read_json(files.own(path / MANIFEST_FILE), _MANIFEST)
            period = manifest.get("seconds", 0.0) // (3600 * hours)
            if period != last:
                lasting.add(path)
            last = period
    old = [path for path in kept[keep:] if path not in lasting] if keep else []
    for path in [*directory.glob(f"{_PREFIX}*{_PARTIAL}"), *later, *old]:
        shutil.rmtree(path, ignore_errors=True)


class Saving:
    """Writer of a run's checkpoints: synchronous with one process, in a background thread with several.

    With several, training waits only until each process has copied its shards. One checkpoint is written at a time; the
    next one waits for it. To be made, and called, by all processes.

    Args:
        directory: of the checkpoints.

    Attributes:
        step: of the last checkpoint that was begun.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.step = directory, 0
        self.group = distributed.background()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(self, step: int, state: dict[str, Any], keep: int | None, hours: float = 0.0) -> None:
        """Start a :func:`save`; with several processes the last one must be over. :meth:`end` raises its error."""
        self.step = step
        if self.group is None:
            self._save(step, state, keep, hours)
            return
        assert self.is_over
        own = _mapped(state, _copied)
        self._thread = threading.Thread(target=self._save, args=(step, own, keep, hours), daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        """Whether nothing is being written."""
        return self._thread is None or not self._thread.is_alive()

    def _save(self, step: int, state: dict[str, Any], keep: int | None, hours: float) -> None:
        try:
            save(self.directory, step, state, keep, hours, self.group)
        except BaseException as error:
            self._error = error

    def end(self, timeout: float | None = None) -> None:
        """Wait until the checkpoint is written; OSError if that failed or took longer than ``timeout`` seconds."""
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise OSError(f"step {self.step} is still being written")
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error


def is_one(directory: Path) -> bool:
    """Whether ``directory`` is a checkpoint, whole or damaged."""
    return any((directory / file).is_file() for file in (STATE_FILE, MANIFEST_FILE))


def load(checkpoint: Path, mapped: bool = False) -> dict[str, Any]:
    """The state that :func:`save` wrote, on the CPU, with divided tensors as :class:`Stored`.

    To be called by all processes: each verifies the checksums of its share of the files, and all raise if one does.
    If ``mapped``, the other tensors are memory-mapped too, so that the file has to stay in place.

    Raises:
        CheckpointError: naming the file that is missing, truncated or damaged.
    """
    state, error = dict[str, Any](), None
    try:
        state = _load(checkpoint, mapped)
    except CheckpointError as own:
        error = own
    if said := [one for one in distributed.gathered(error and str(error)) if one]:
        raise CheckpointError(said[0]) from error
    return state


def _load(checkpoint: Path, mapped: bool) -> dict[str, Any]:
    manifest, path = checkpoint / MANIFEST_FILE, checkpoint / STATE_FILE
    try:
        listed = files.read_json(files.own(manifest), _MANIFEST)["files"]
        pieces = [files.inside(checkpoint, name, str(manifest)) for name in listed if name != STATE_FILE]
    except FileNotFoundError as error:
        raise CheckpointError(f"{manifest} is missing: the checkpoint was not finished") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{manifest} is damaged ({error})") from error
    for i, file in enumerate([path, *pieces]):
        is_mine = i % distributed.world_size() == distributed.rank()
        _check(file, listed[file.name], file == path or is_mine)
    try:
        weights.check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        index = state.pop(_PIECES, []) if isinstance(state, dict) else []
        for one in files.shaped(index, _INDEX, _PIECES):
            *outer, last = one["path"]
            if unknown := {piece["file"] for piece in one["at"]} - listed.keys():
                raise CheckpointError(f"it refers to {', '.join(sorted(unknown))}, which {manifest} does not list")
            node = state
            for key in outer:
                node = node[key]
            node[last] = Stored(checkpoint, **one)
        return state
    except (*_UNREADABLE, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error


def _check(path: Path, expected: dict[str, int], whole: bool) -> None:
    """Raise CheckpointError unless the file has its size and, if ``whole``, its checksum."""
    try:
        size = path.stat().st_size  # before it is read
        if size != expected["bytes"]:
            raise CheckpointError(f"{path} has {size} bytes, not the {expected['bytes']} of its {MANIFEST_FILE}")
        if whole and _checksum(files.own(path)) != expected["crc32"]:
            raise CheckpointError(f"{path} is damaged: its checksum differs from its {MANIFEST_FILE}")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error


def newest(directory: Path, log: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest valid checkpoint and its state, or None; ``log`` gets a message for each damaged one.

    To be called by all processes, which try those that the first one finds.
    """
    for name in distributed.gathered([path.name for path in newest_first(directory)])[0]:
        try:
            return directory / name, load(directory / name)
        except CheckpointError as error:
            log(f"skipping checkpoint {name}: {error}")
    return None


def newest_first(directory: Path) -> list[Path]:
    """The checkpoints in ``directory``, whole or damaged; not copies under other names."""
    return sorted((path for path in directory.glob(_PREFIX + "*") if _NAME.fullmatch(path.name)), reverse=True)


def adopt(checkpoint: Path, directory: Path) -> None:
    """Copy ``checkpoint`` to ``directory``, and remove later ones there, so that a killed run resumes from it."""
    place = directory / f"{_PREFIX}{files.read_json(checkpoint / MANIFEST_FILE, {'step': int})['step']:08d}"
    is_there = files.real(checkpoint) == files.real(place)
    for other in newest_first(directory):
        if other > place or (other == place and not is_there):
            shutil.rmtree(other)
    if not is_there:
        directory.mkdir(exist_ok=True)
        with files.replacing_folder(place) as partial:
            for file in checkpoint.iterdir():
                shutil.copyfile(file, partial / file.name)


def _together(work: Callable[[], T], group: Any) -> list[T]:
    """Results of ``work`` in each process; if it fails in one of several, all raise an OSError that says which."""
    if distributed.world_size() == 1:
        return [work()]
    found, error = None, ""
    try:
        found = work()
    except Exception as own:  # or the others would wait for this one
        error = str(own) or type(own).__name__
    try:
        results = distributed.gathered((found, error), group)
    except RuntimeError as ended:
        raise OSError(f"another process has ended: {ended}") from ended
    for i, (_, said) in enumerate(results):
        if said:
            raise OSError(said if i == 0 else f"process {i}: {said}")
    return [result for result, _ in results]


def _apart(state: Any) -> tuple[Any, Parts]:
    """A state with None in place of its parts, and the parts by their paths."""
    parts: Parts = {}
    return _mapped(state, lambda value, path: parts.update({path: value}) if isinstance(value, Part) else value), parts


def _copied(value: Any, path: Place) -> Any:
    """Copy to the CPU a tensor that this process writes; other values as they are."""
    if isinstance(value, Part) and value.is_mine:
        return replace(value, held=_copied(value.held, path))
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _mapped(value: Any, change: Callable[[Any, Place], Any], path: Place = ()) -> Any:
    """Apply ``change`` to each leaf of nested dicts and lists, and to its path."""
    if isinstance(value, dict):
        return {key: _mapped(one, change, (*path, key)) for key, one in value.items()}
    if isinstance(value, list):
        return [_mapped(one, change, (*path, i)) for i, one in enumerate(value)]
    return change(value, path)


def _name(path: Place) -> str:
    return "/".join(map(str, path))


def _checksum(path: Path) -> int:
    checksum = 0
    with files.opened(path) as file:
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
