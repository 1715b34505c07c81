"""The wheel, installed with only its dependencies: the command and the shipped models work without a warning."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent


def call(*command: object, cwd: Path) -> str:
    """The output of a command, which must succeed; variables that point Python to the checkout are removed."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONWARNINGS")}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an sdist of the tracked files, and a wheel built from that sdist."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "benchmarks/", "docs/", "notebooks/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=source)
    return out


def needed(requirements: list[str], seen: dict[str, metadata.Distribution]) -> Iterator[metadata.Distribution]:
    """The installed distributions that these requirements need, recursively, without extras."""
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = metadata.distribution(requirement.name)
        assert requirement.specifier.contains(found.version, prereleases=True), (requirement, found.version)
        if found.name not in seen:
            seen[found.name] = found
            yield found
            yield from needed(found.requires or [], seen)


@pytest.fixture(scope="module")
def clean(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, and symlinks to its dependencies, so that torch is not downloaded again."""
    where = tmp_path_factory.mktemp("clean")
    venv.create(where / "venv", with_pip=False)
    python = where / "venv" / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    call(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=where)
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=where).strip())
    (info,) = site.glob("open_mythos-*.dist-info")
    asked = metadata.PathDistribution(info).requires or []
    for distribution in needed(asked, {}):
        for top in {file.parts[0] for file in distribution.files or [] if ".." not in file.parts}:
            if top != "__pycache__" and not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    return where


def test_wheel_and_sdist_include_the_data_files(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    held = set(zipfile.ZipFile(wheel).namelist())
    package = (ROOT / "open_mythos").rglob("*")
    others = [path for path in package if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert {"decode.c", "page.html", "page.css", "page.js", "py.typed", "model.safetensors"} <= {p.name for p in others}
    for path in others:
        name = path.relative_to(ROOT).as_posix()
        assert name in held and name in inside
    assert not [name for name in held if name.startswith(("tests", "benchmarks", "dev", "docs", "notebooks"))]


def test_commands_and_models_work_with_only_the_wheels_dependencies(clean: Path) -> None:
    python, mythos = clean / "venv" / "bin" / "python", clean / "venv" / "bin" / "mythos"
    assert "recurrent" in call(mythos, "--help", cwd=clean).lower()
    assert "parameters" in call(mythos, "info", "nano", cwd=clean)
    code = """
import importlib.util, torch, open_mythos
from open_mythos import OpenMythos, tasks
assert "site-packages" in open_mythos.__file__
absent = ("matplotlib", "transformers", "datasets", "torchao", "tokenizers", "pytest")
assert not [name for name in absent if importlib.util.find_spec(name)]
ids, answers, _ = tasks.load("parity").batch(8, 48, torch.Generator().manual_seed(0))
with torch.inference_mode():
    print(float((OpenMythos.from_pretrained("parity-tiny")(ids, n_loops=32).argmax(-1) == answers).float().mean()))
"""
    assert float(call(python, "-W", "error", "-c", code, cwd=clean)) > 0.99
