"""Atomic, checksummed checkpoints of a run, one directory each."""

import io
import os
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from open_mythos import files, weights
from open_mythos.weights import CheckpointError

STATE_FILE, MANIFEST_FILE = "state.pt", "manifest.json"
_MANIFEST = {"files": {STATE_FILE: {"bytes": int, "crc32": int}}}
_PREFIX, _PARTIAL = "step_", ".partial"


def save(directory: Path, step: int, state: dict[str, Any], keep: int | None) -> Path:
    """Write ``directory/step_XXXXXXXX`` atomically, then remove all but the newest ``keep`` (at least 1; None: all).

    Those of later steps are removed, too: the run has gone on from an earlier one, without them.

    Files are written and fsynced in a temporary directory, the manifest with sizes and checksums last, which is then
    renamed. On failure it is removed, and older checkpoints stay. ``state`` holds tensors and plain values.

    Raises:
        OSError: if it cannot be written.
    """
    final = directory / f"{_PREFIX}{step:08d}"
    partial = final.with_name(final.name + _PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        directory.mkdir(exist_ok=True)  # but not the run's folder: a disk that is gone may come back
        partial.mkdir()
        buffer = io.BytesIO()  # torch.save to a file reports a full disk as a zip error
        torch.save(state, buffer)
        content = buffer.getbuffer()
        files.write(partial / STATE_FILE, content)
        listed = {STATE_FILE: {"bytes": len(content), "crc32": zlib.crc32(content)}}
        files.write_json(partial / MANIFEST_FILE, {"step": step, "files": listed})
        shutil.rmtree(final, ignore_errors=True)  # exists only if it was damaged
        os.replace(partial, final)
        files.sync(directory)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    kept = newest_first(directory)
    later, kept = [path for path in kept if path > final], [path for path in kept if path <= final]
    for old in [*directory.glob(f"{_PREFIX}*{_PARTIAL}"), *later, *(kept[keep:] if keep else ())]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load(checkpoint: Path) -> dict[str, Any]:
    """The state that :func:`save` wrote, on the CPU.

    Raises:
        CheckpointError: naming the file that is missing, truncated or damaged.
    """
    manifest, path = checkpoint / MANIFEST_FILE, checkpoint / STATE_FILE
    try:
        expected = files.read_json(files.own(manifest), _MANIFEST, 1 << 20)["files"][STATE_FILE]
        n_bytes, checksum = expected["bytes"], expected["crc32"]
    except FileNotFoundError as error:
        raise CheckpointError(f"{manifest} is missing: the checkpoint was not finished") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{manifest} is damaged ({error})") from error
    try:
        size = path.stat().st_size  # before it is read
        if size != n_bytes:
            raise CheckpointError(f"{path} has {size} bytes of the {n_bytes} in its {MANIFEST_FILE}")
        content = files.read_bytes(files.own(path), size)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    if zlib.crc32(content) != checksum:
        raise CheckpointError(f"{path} is damaged: its checksum differs from its {MANIFEST_FILE}")
    try:
        weights.check_archive(io.BytesIO(content))
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error


def newest(directory: Path, log: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest valid checkpoint and its state, or None; ``log`` gets a message for each damaged one."""
    for checkpoint in newest_first(directory):
        try:
            return checkpoint, load(checkpoint)
        except CheckpointError as error:
            log(f"skipping checkpoint {checkpoint.name}: {error}")
    return None


def newest_first(directory: Path) -> list[Path]:
    """The checkpoints that are there, whole or damaged."""
    return sorted((path for path in directory.glob(_PREFIX + "*") if path.suffix != _PARTIAL), reverse=True)
