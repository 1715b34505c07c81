"""Malicious folders: reading them touches nothing outside, runs none of their code, and takes bounded memory and time.

All are read in one subprocess with limited memory, each by the reader that has to refuse it; with ``HOSTILE=all`` by
every function that reads a model or a run.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers import tiny_model

from open_mythos import weights
from open_mythos.checkpoint import SHIPPED
from open_mythos.cli.whole import examine
from open_mythos.integrations.upstream.files import read as read_upstream
from open_mythos.models import card_of, load_model, tokenizer_of
from open_mythos.training import checkpoints
from open_mythos.training.runs import training_config

ALL = os.environ.get("HOSTILE") == "all"
ROOM, SECONDS = 1 << 30, 5.0  # bytes beyond what the libraries take; seconds for each folder
Make = Callable[[Path], Any]


class Harm:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {os.environ['CANARY']}",)


def text(name: str, content: str | bytes) -> Make:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def changed(name: str, **values: Any) -> Make:
    def make(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(data | values))

    return make


def index(weight_map: Any, file: str = "model.safetensors") -> Make:
    def make(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        (folder / f"{file}.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return make


def sparse(name: str) -> Make:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        with (folder / name).open("wb") as file:
            file.truncate(50 << 30)

    return make


def link(name: str, to: str) -> Make:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(to.format(outside=folder.parent / "outside"))

    return make


def pipe(name: str) -> Make:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def pickled(name: str, data: Any, packed: bool = False, protocol: int = 2) -> Make:
    """Replace the weights by a pickle: bare, or as torch.save writes it if ``protocol`` is 0."""

    def make(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        if protocol:
            (folder / name).write_bytes(pickle.dumps(data, protocol))
            return
        torch.save(data, folder / name)
        if packed:
            repack(folder / name, zipfile.ZIP_DEFLATED)

    return make


def repack(path: Path, how: int, prefix: str = "") -> None:
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", how) as new:
        for name, content in entries.items():
            new.writestr(prefix + name, content)


def climbing(folder: Path) -> None:
    """An archive whose entries would be written outside of the folder."""
    pickled("pytorch_model.bin", {"a": torch.ones(3)}, protocol=0)(folder)
    repack(folder / "pytorch_model.bin", zipfile.ZIP_STORED, "../../outside/")


def instead(make: Callable[[str], Make]) -> Make:
    """Put pickled weights in place of model.safetensors."""

    def made(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        make("pytorch_model.bin")(folder)

    return made


def tensor(length: int, start: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [length], "data_offsets": [start, end]}


def header(content: dict[str, Any], size: int | None = None) -> Make:
    """A safetensors file with this header, and optionally a wrong size of the header."""

    def make(folder: Path) -> None:
        said = json.dumps(content).encode()
        (folder / "model.safetensors").write_bytes((size or len(said)).to_bytes(8, "little") + said + bytes(64))

    return make


def state(make: Make) -> Make:
    """Apply ``make`` to a checkpoint of a run."""

    def made(folder: Path) -> None:
        step = checkpoints.save(folder / "checkpoints", 1, {"step": 1}, keep=1)
        make(step)

    return made


def claimed(data: Any) -> Make:
    """A pickled state, with a manifest that matches it."""

    def make(step: Path) -> None:
        content = pickle.dumps(data)
        (step / "state.pt").write_bytes(content)
        listed = {"state.pt": {"bytes": len(content), "crc32": zlib.crc32(content)}}
        (step / "manifest.json").write_text(json.dumps({"step": 1, "files": listed}))

    return make


def remote_code(folder: Path) -> None:
    for name in ("modeling_open_mythos", "configuration_open_mythos", "__init__", "conftest", "tokenization"):
        (folder / f"{name}.py").write_text(f"open({os.environ['CANARY']!r}, 'w')\n")
    auto = {"AutoModel": "modeling_open_mythos.Model", "AutoConfig": "configuration_open_mythos.Config"}
    changed("config.json", auto_map=auto)(folder)


TOKEN = '{"model": {"type": "BPE", "vocab": {"a": %s}, "merges": []}, "added_tokens": []}'
DEEP = "[" * 100_000
HOSTILE: dict[str, tuple[Make, str]] = {  # how to make it, and the reader that has to refuse it ("" if it is ignored)
    **{
        f"index naming {names!r:.40}": (index({"embed.weight": names}), "model")
        for names in (
            "../outside/w.safetensors", "/etc/passwd", "a/../../outside/w.safetensors", "..", "", "part.safetensors\0",
            "model.safetensors.index.json", ["part.safetensors"], 3, None, {"a": "b"}, "C:\\w", "nowhere.safetensors",
            "./part.safetensors", "~/w.safetensors", "file:///etc/passwd",
        )
    },
    **{f"index of {shape!r:.20}": (index(shape), "model") for shape in ([], 3, None, "part.safetensors", {})},
    "index of a bin that climbs": (index({"a": "../outside/w.bin"}, "pytorch_model.bin"), "upstream"),
    "index 100,000 deep": (lambda f: (index({})(f), text("model.safetensors.index.json", DEEP)(f)), "model"),
    **{
        f"config with {key}={value:g}": (changed("config.json", **{key: value}), "model")
        for key, value in (
            ("prelude_layers", 10**7), ("core_layers", 10**9), ("dim", 10**9), ("vocab_size", 10**15), ("dim", 10**300),
            ("n_experts", 10**12), ("max_loop_iters", 10**9), ("lora_rank", 10**12), ("n_heads", -1), ("dim", 1e308),
        )
    },
    "config 100,000 deep": (text("config.json", DEEP), "model"),
    "config of a number of 10,000 digits": (text("config.json", '{"dim": ' + "9" * 10_000 + "}"), "model"),
    "training.json 100,000 deep": (text("training.json", '{"kind": ' + DEEP), "model"),
    **{f"50 GB of {name}": (sparse(name), reader) for name, reader in (
        ("model.safetensors", "model"), ("config.json", "model"), ("training.json", "model"),
        ("tokenizer.json", "words"), ("README.md", "card"), ("tokenizer_config.json", ""),
    )},
    "50 GB of state": (state(sparse("state.pt")), "state"),
    "50 GB of manifest": (state(sparse("manifest.json")), "state"),
    "50 GB of pickled weights": (instead(sparse), "upstream"),
    "token 4,000,000,000": (text("tokenizer.json", TOKEN % 4_000_000_000), "words"),
    "token -1": (text("tokenizer.json", TOKEN % -1), "words"),
    "tokenizer 100,000 deep": (text("tokenizer.json", '{"model": ' + DEEP), "words"),
    "header of 2^62 bytes": (header({}, 1 << 62), "model"),
    "header of a tensor of 2^60": (header({"a": tensor(1 << 60, 0, 1 << 62)}), "model"),
    "header of overlapping tensors": (header({"a": tensor(9, 0, 36), "b": tensor(9, 0, 36)}), "model"),
    "header of negative offsets": (header({"a": tensor(-1, -4, 0)}), "model"),
    **{f"{name} a link to {to}": (link(name, to), reader) for name, to, reader in (
        ("config.json", "/etc/passwd", "model"), ("config.json", "{outside}/config.json", "model"),
        ("model.safetensors", "{outside}/w.safetensors", "model"),
        ("model.safetensors", "../outside/w.safetensors", "model"),
        ("tokenizer.json", "{outside}/tokenizer.json", "words"), ("README.md", "/etc/passwd", "card"),
        ("training.json", "{outside}/training.json", "model"), ("config.json", "config.json", "model"),
        ("model.safetensors", "/dev/zero", "model"), ("config.json", "/dev/zero", "model"),
        ("README.md", "/dev/zero", "card"),
        ("model.safetensors", "/dev/stdin", "model"), ("tokenizer.json", "/proc/self/environ", "words"),
    )},
    "a checkpoint's state a link": (state(link("state.pt", "/etc/passwd")), "state"),
    **{f"{name} a pipe": (pipe(name), reader) for name, reader in (
        ("config.json", "model"), ("model.safetensors", "model"), ("tokenizer.json", "words"), ("README.md", "card"),
    )},
    "a pipe of pickled weights": (instead(pipe), "upstream"),
    **{f"pickle {protocol} in {name}": (pickled(name, {"model": Harm()}, protocol=protocol), "upstream")
       for protocol in (0, 2, 4) for name in ("pytorch_model.bin",)},
    "a pickle called safetensors": (pickled("model.safetensors", Harm()), "model"),
    "packed entries": (pickled("pytorch_model.bin", {"a": torch.zeros(1 << 22)}, packed=True, protocol=0), "upstream"),
    "entries that climb": (climbing, ""),
    "a state that runs code": (state(claimed(Harm())), "state"),
    "code in the folder": (remote_code, ""),
}  # fmt: skip
READERS: dict[str, Callable[[Path], Any]] = {
    "model": load_model, "words": tokenizer_of, "card": card_of, "upstream": read_upstream, "training": training_config,
    "doctor": lambda folder: list(examine(str(folder))),
    "state": lambda folder: [checkpoints.load(step) for step in sorted(folder.glob("checkpoints/step_*"))],
}  # fmt: skip


def walk(here: Path) -> None:
    """Read the folders with their readers, and print what went wrong."""
    outside = here / "outside"
    shutil.copytree(SHIPPED / "text-tiny", outside)
    tiny_model(vocab_size=257).save_pretrained(outside)
    shutil.copy(outside / "model.safetensors", outside / "w.safetensors")
    before = {path: path.read_bytes() for path in outside.iterdir()}
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    resource.setrlimit(resource.RLIMIT_AS, (int(Path("/proc/self/statm").read_text().split()[0]) * 4096 + ROOM,) * 2)
    wrong, n = [], 0
    for name, (make, refuses) in HOSTILE.items():
        folder = here / "folder"
        shutil.copytree(outside, folder)
        make(folder)
        opened.clear()
        started = time.monotonic()
        for reader, read in READERS.items():
            if not ALL and refuses not in ("", reader):
                continue
            n += 1
            try:
                read(folder)
                said = ""
            except (ValueError, OSError) as error:
                said = str(error)
            except BaseException as error:
                said = ""
                wrong.append(f"{name}, {reader}: {type(error).__name__}: {error!s:.200}")
            if reader == refuses and not said:
                wrong.append(f"{name}: taken by {reader}")
        if (seconds := time.monotonic() - started) > SECONDS:
            wrong.append(f"{name}: {seconds:.1f} s")
        for path in opened:
            if path.startswith(("/etc/passwd", "/dev/zero", str(outside))) or (
                path.startswith(str(folder)) and path.endswith(".py")
            ):
                wrong.append(f"{name}: opened {path}")
        if {path: path.read_bytes() for path in outside.iterdir()} != before or Path(os.environ["CANARY"]).exists():
            wrong.append(f"{name}: wrote or ran something")
        shutil.rmtree(folder)
    print(f"{len(HOSTILE)} hostile folders, {n} readings, {len(wrong)} wrong")
    print("\n".join(wrong))
    # reading a damaged file takes at most twice its size
    path = here / "w.safetensors"
    weights.write(path, {str(i): torch.ones(1 << 22) for i in range(6)})
    with path.open("r+b") as file:
        file.seek(-9, 2)
        file.write(b"\1")
    size, peak = path.stat().st_size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        weights.read(path)
    except ValueError:
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
        print("memory: " + ("wrong" if grown > 2 * size else "right"))
    raise SystemExit(bool(wrong))


def test_hostile_folders_are_refused_without_side_effects(tmp_path: Path) -> None:
    assert len(HOSTILE) >= 60
    environment = os.environ | {"CANARY": str(tmp_path / "canary")}
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, env=environment, timeout=200,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0 and "memory: right" in done.stdout, done.stdout + done.stderr[-2000:]


if __name__ == "__main__":
    walk(Path(sys.argv[1]))
