"""Every command with invalid input: one line that names it, exit code 1 or 2, and no files are left behind.

``BAD_INPUT=all`` tests every combination, otherwise a quick selection.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fabricated import fabricate_run
from typer.testing import CliRunner, Result

from open_mythos import OpenMythos
from open_mythos.cli import app
from open_mythos.models import SHIPPED

ALL = os.environ.get("BAD_INPUT") == "all"
SOURCES = {  # commands that read a model, with the arguments before and after its name
    "info": ([], []),
    "plan": ([], ["--gpus", "1"]),
    "diagnose": ([], ["--loops", "1"]),
    "eval": ([], ["--difficulties", "2", "--loops", "1", "--examples", "1"]),
    "report": ([], ["--difficulty", "2", "--loops", "1"]),
    "chat": ([], ["--max-tokens", "1", "--loops", "1"]),
    "export": ([], ["out"]),
    "train-gate": ([], ["--steps", "1", "--out", "out"]),
    "convert": ([], ["out"]),
    "bench": ([], ["--only", "prefill", "--tokens", "8", "--seconds", "0"]),
    "doctor": ([], []),
    "train": (["heal"], ["--out", "out"]),
    "retrofit": ([], ["--out", "out"]),
}
OUTS = {  # commands that write, up to the output path
    "train": ["train", "debug", "steps=1", "--out"],
    "compare": ["compare", "debug", "steps=1", "--out"],
    "demo": ["demo", "--steps", "1", "--out"],
    "demo --pretrained": ["demo", "--pretrained", "--out"],
    "eval": ["eval", "run", "--out"],
    "eval --harness": ["eval", "run", "--harness", "x", "--out"],
    "train-gate": ["train-gate", "run", "--steps", "1", "--out"],
    "diagnose": ["diagnose", "run", "--plots"],
    "report": ["report", "run", "--out"],
    "export": ["export", "run"],
    "convert": ["convert", "binary.bin"],
    "retrofit": ["retrofit", "folder", "--out"],
    "tokenize": ["tokenize", "stdlib", "--max-bytes", "9999", "--out"],
}
NAMES = [
    "nowhere", "folder", "file.txt", "empty.json", "binary.bin", "loop", "dangling", "no such name", "-dash", "./-dash",
    "имя 名前",
    "[red]x[/red]", "[/]", ":smile:", "", "a" * 300, "..", "owner/name", "notes.txt/x",
]  # fmt: skip
NOT_PLACES = ["loop", "dangling", "notes.txt/x", "/proc/1/x", "a" * 300]
THEIRS = {
    "report": ["notes.txt", "picture.png", "page.html"],
    "eval": ["evaluation.json", "grid.png"],
    "eval --harness": ["harness.json", "harness.png"],
    "diagnose": ["state_change.png", "halting.png"],
    "compare": ["compare.json", "compare-8.png"],
    "demo": ["config.json", "table.json", "depth.png", "evaluation.json", "metrics.jsonl", "model/config.json"],
    "demo --pretrained": ["table.json", "depth.png", "evaluation.json", "model/model.safetensors"],
    "train": ["config.json", "metrics.jsonl", "evaluation.json", "checkpoints", "model/README.md", "model/config.json"],
    "train-gate": ["config.json", "model.safetensors", "tokenizer.json", "training.json"],
    "convert": ["config.json", "model.safetensors", "tokenizer.json"],
    "export": ["anything"],
    "tokenize": ["anything", "tokens.json"],
}  # fmt: skip
SPOILT = [
    b"", b"\x00\xff\x80" * 99, b"[]", b"3", b"null", b"{}", b'{"grids": 3}', b"[" * 100_000, b"\xff\xfe{}",
    b'{"model": 7, "vocab_size": -1, "kind": [], "tokens": "x", "seeds": {}}', None,
]  # fmt: skip
FILES = {
    "run/evaluation.json": ["report"],
    "run/compare.json": ["report"],
    "run/config.json": ["train", "compare"],
    "run/metrics.jsonl": ["report"],
    "run/model/config.json": ["info", "eval", "report", "diagnose", "export", "bench", "doctor"],
    "run/model/training.json": ["eval", "report", "train-gate", "diagnose"],
    "run/model/model.safetensors": ["eval", "report", "export", "diagnose"],
    "run/model/example.json": ["diagnose"],
    "text/tokenizer.json": ["chat"],
    "text/tokenizer_config.json": ["chat"],
    "text/training.json": ["eval"],
}
SETTINGS = [
    "steps=1 steps=2", "data=x data=y", "unknown=3", "model.=3", "=", "==", "steps", "steps=", "steps=[]", "steps=nan",
    "optim.lr=inf",
    "model.dim=1000000000000", "task.options.x=1", "task.options.x=" + "-" * 100_000 + "1", "task.options={", "[red]=1",
    "loops.maximum=" + "9" * 5000, "evaluation.loops=,", "model.n_heads=0", "start=nowhere",
    "start=loop", "task.name=[/]",
]  # fmt: skip


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    here = tmp_path_factory.mktemp("there")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setattr("open_mythos.integrations.original.find_hub", lambda: None)
        patch.setattr("open_mythos.cli.harness.find_hub", lambda: None)
        fabricate_run(here / "run")
        shutil.copytree(SHIPPED / "text-tiny", "text")
        Path("folder").mkdir()
        Path("file.txt").write_text("not a model\n")
        Path("notes.txt").write_text("mine\n")
        Path("empty.json").touch()
        Path("binary.bin").write_bytes(bytes(range(256)) * 9)
        Path("loop").symlink_to("loop")
        Path("dangling").symlink_to("nothing")
        yield here


def state(folder: Path) -> dict[str, bytes | None]:
    """All paths in ``folder``, with the content of files."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(words: list[str], names: str, may_pass: bool = False, typed: str | bytes = "hi\n") -> str:
    """Run a command that should be refused; return what is wrong with the refusal, or an empty string."""
    done: Result = CliRunner().invoke(app, words, input=typed)
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", done.stderr).split())
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        return f"{type(done.exception).__name__}: {done.exception!s:.200}"
    if done.exit_code == 0:
        return "" if may_pass else "taken"
    if done.exit_code not in (1, 2):
        return f"exit code {done.exit_code}"
    if done.stderr.startswith("error: ") and len(done.stderr.strip().splitlines()) > 1:
        return f"several lines: {said:.300}"
    is_named = names.replace(" ", "") in (said + done.stdout).replace(" ", "")
    return "" if is_named else f"does not name {names!r:.80}: {said:.300}"


def check(combinations: list[tuple[list[str], str, bool]], here: Path, quick: int) -> None:
    """Run all of ``combinations``, or about ``quick`` of them, evenly spaced."""
    chosen = combinations if ALL else combinations[:: max(1, len(combinations) // quick)]
    wrong, before = [], state(here)
    for words, names, may_pass in chosen:
        if problem := refused(words, names, may_pass):
            wrong.append(f"{' '.join(words):.120}: {problem}")
        if not may_pass and (after := state(here)) != before:
            changed = sorted(key for key in after.keys() | before if after.get(key, 0) != before.get(key, 0))
            wrong.append(f"{' '.join(words):.120}: changed {changed}")
            before = after
    print(f"{len(chosen)} of {len(combinations)} combinations, {len(wrong)} wrong")
    assert not wrong, "\n".join(wrong)


def test_sources_that_are_not_models_are_refused(there: Path) -> None:
    combinations = []
    for (command, (first, then)), name in itertools.product(SOURCES.items(), NAMES):
        if command == "train":
            words = [command, *first, f"start={name or 'nowhere'}", *then]
        else:
            words = [command, "--", name, *then] if then == ["out"] else [command, *then, "--", name]
        combinations.append((words, name.removeprefix("./")[:40], False))
    check(combinations, there, 45)


def test_unwritable_output_paths_are_refused(there: Path) -> None:
    combinations = [([*words, name], name[:40], False) for words, name in itertools.product(OUTS.values(), NOT_PLACES)]
    check(combinations, there, 20)


def test_no_command_overwrites_files_of_the_user(there: Path) -> None:
    combinations = []
    for command, names in THEIRS.items():
        for i, name in enumerate(names):
            place = Path(f"theirs-{command.replace(' ', '')}-{i}")
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            if name:
                (place / name).write_text('{"mine": 1}')
            at = place / name if command == "report" else place
            combinations.append(([*OUTS[command], str(at)], place.name, False))
    check(combinations, there, 99)


def test_damaged_files_of_a_run_are_named(there: Path) -> None:
    combinations = [
        (file, content, command)
        for (file, commands), content in itertools.product(FILES.items(), SPOILT)
        for command in commands
        if not (file.endswith("config.json") and content == b"{}")  # valid: all defaults
        if not (file == "run/config.json" and command == "train")  # rewrites the file, and reports it
    ]
    chosen, wrong = combinations if ALL else combinations[::6], []
    for file, content, command in chosen:
        top, _, name = file.partition("/")
        place = Path("spoilt/looped-seed0")
        shutil.copytree(top, place)
        whole = (place / name).read_bytes() if (place / name).is_file() else b'{"seeds": [1], "recipe": "parity"}'
        (place / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
        words = {
            "train": ["train", "debug", "--resume", "auto", "--out", str(place)],
            "compare": ["compare", "debug", "--seeds", "0", "--out", "spoilt"],
        }.get(command) or [command, str(place), *SOURCES[command][1]]
        may_pass = name in ("metrics.jsonl", "tokenizer_config.json")  # read as far as possible; not needed
        before = state(place)
        if problem := refused(words, Path(name).name, may_pass):
            wrong.append(f"{command} with {file} of {content!r:.20}: {problem}")
        if not may_pass and state(place) != before:
            wrong.append(f"{command} with {file} of {content!r:.20}: files changed")
        shutil.rmtree("spoilt")
    print(f"{len(chosen)} of {len(combinations)} combinations, {len(wrong)} wrong")
    assert not wrong and not Path("out").exists(), "\n".join(wrong)


def named(setting: str) -> str:
    """The part of a setting that an error about it has to name."""
    key, _, value = setting.split()[0].partition("=")
    return value if key in ("start", "task.name") else key.split(".")[-1][:40]


def test_invalid_settings_are_refused(there: Path) -> None:
    combinations = [
        ([command, "debug", *setting.split(), "--out", "out"], named(setting), False)
        for command, setting in itertools.product(("train", "compare"), SETTINGS)
    ]
    check(combinations, there, 44)


def test_chat_accepts_input_that_is_not_utf8(there: Path) -> None:
    done = CliRunner().invoke(app, ["chat", "text", "--max-tokens", "1", "--loops", "1"], input=b"\xff\xfe hi\n")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("name", ["[red]x[/red]", "[/]", ":smile:", "a [bold]b", "имя 名前"])
def test_names_are_printed_as_they_are(there: Path, name: str) -> None:
    shutil.copytree("run", Path("named") / name)
    for words in (
        ["info"],
        ["diagnose"],
        ["report"],
        ["eval", "--difficulties", "2", "--loops", "1", "--examples", "1"],
    ):
        done = CliRunner().invoke(app, [words[0], f"named/{name}", *words[1:]])
        assert done.exit_code == 0 and f"named/{name}" in done.stdout.replace("\n", ""), done.output


def test_results_of_an_earlier_command_are_overwritten(there: Path) -> None:
    lines = (
        ["eval", "run", *SOURCES["eval"][1], "--out", "again"],
        ["diagnose", "run", "--loops", "1", "--plots", "again"],
        ["report", "run", *SOURCES["report"][1], "--out", "again/p.html"],
    )
    for words in lines:
        for _ in range(2):
            done = CliRunner().invoke(app, words)
            assert done.exit_code == 0, done.output
    assert json.loads(Path("again/evaluation.json").read_text())["grids"]


def test_library_files_of_another_kind_are_not_overwritten(there: Path) -> None:
    """Data of a run, other models, folders of tokens, and the working directory."""
    gate = ["train-gate", "run", "--steps", "1", "--out"]
    shutil.copytree("run", "spare")
    assert CliRunner().invoke(app, [*OUTS["tokenize"], "tokens"]).exit_code == 0
    check([
        (["report", "run", "--out", "run/evaluation.json"], "run/evaluation.json", False),
        (["report", "run", "--out", "run/model/config.json"], "run/model/config.json", False),
        ([*gate, "text"], "text", False), ([*gate, "spare"], "spare is a run", False), ([*gate, ""], "--out", False),
        (["tokenize", "tokens", "--out", "out"], "tokens", False), (["tokenize", "", "--out", "out"], "", False),
        (["train", "text", "data=", "--out", "out"], "source", False),
        (["train", "debug", "--out", "out", "--resume", "run"], "run", False),
        (["chat", "text", "--seed", "9" * 20], "--seed", False), (["plan", "1b", "--gpus", "9" * 9], "--gpus", False),
        (["eval", "run", "--device", "meta"], "meta", False),
    ], there, 12)  # fmt: skip


def test_a_model_with_nan_weights_is_not_evaluated(there: Path) -> None:
    shutil.copytree("run", "bad")
    model = OpenMythos.from_pretrained("bad")
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    model.save_pretrained("bad/model")
    done = CliRunner().invoke(app, ["eval", "bad", *SOURCES["eval"][1]])
    assert done.exit_code == 2 and "logits are not finite" in " ".join(done.output.split())
