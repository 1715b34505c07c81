"""``mythos tokenize`` writes a folder of tokens for `mythos train text`, or reports an error and leaves no files."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from open_mythos.cli import app
from open_mythos.tasks import filling
from open_mythos.tasks.store import opened
from open_mythos.tasks.text import Text
from open_mythos.training.recipes import configured


def run(line: str) -> Result:
    return CliRunner().invoke(app, shlex.split(line))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("my texts").mkdir()
    for i in range(50):
        Path(f"my texts/{i}.txt").write_text(f"the same weights, run for {i} loops\n" * 9)
    return tmp_path


def test_text_is_tokenized_into_a_folder_to_train_on(here: Path) -> None:
    done = run("tokenize 'my texts' --out 'my tokens'")
    assert done.exit_code == 0, done.output
    found = opened(here / "my tokens")
    said = done.stdout.splitlines()
    sizes = [sum(getattr(part, name) for part in found.parts.values()) for name in ("tokens", "bytes")]
    assert said[0].startswith(f"my tokens: {sizes[0]:,} tokens of {sizes[1]:,} bytes, in 2 shards; ")
    assert re.match(r"\d+\.\d s: \S+ [kM]B/s, \S+ [kM] tokens/s by 1 process$", said[1]), said[1]
    assert said[2] == "Next: mythos train text 'data=my tokens'."
    recipe, setting = shlex.split(said[2].removeprefix("Next: ").removesuffix("."))[2:]
    cfg = configured(recipe, [setting])
    where = str(here / "my tokens")
    assert cfg.task.options == {"source": where, "tokenizer": where, "separate": True}
    assert Text(**cfg.task.options).n_rows(32) == -(-(found.parts["train"].tokens - 1) // 32)
    assert [path.name for path in here.iterdir() if path.name.startswith(".")] == []
    done = run("doctor 'my tokens'")
    assert done.exit_code == 0 and done.stdout.count("intact  ") == 4, done.output
    (here / "my tokens/train-00000.bin").write_bytes(b"x" * 2 * found.parts["train"].tokens)
    done = run("doctor 'my tokens'")
    file = "my tokens/train-00000.bin"
    assert done.exit_code == 1 and f"DAMAGED  {file}: {file} is damaged: its" in done.stdout, done.output


def test_existing_folders_are_not_overwritten(here: Path) -> None:
    assert run("tokenize 'my texts'").exit_code == 0
    before = opened(here / "tokens").parts
    done = run("tokenize 'my texts' --tokenizer bytes")
    assert done.exit_code == 2 and "tokens exists and is not overwritten; train on it with mythos train" in done.stderr
    assert opened(here / "tokens").parts == before
    done = run("tokenize tokens --out 'my texts'")
    assert done.exit_code == 2 and "my texts exists and is not overwritten; give another --out" in done.stderr


def test_an_interrupted_command_resumes_when_repeated(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "SHARD", 2000)
    monkeypatch.setattr(filling, "_AT_ONCE", 500)
    write, count = filling._write_shard, list[int]()

    def stopping(*what: object) -> bool:
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return write(*what)  # type: ignore[arg-type]

    monkeypatch.setattr(filling, "_write_shard", stopping)
    done = run("tokenize 'my texts'")
    assert done.exit_code not in (0, 2) and ".tokens.partial, and the same command continues from there" in done.stderr
    assert not (here / "tokens").exists()
    done = run("tokenize 'my texts'")
    assert done.exit_code == 0 and re.search(r"bytes, [\d.]+ kB of it before, in", done.stdout), done.output
    assert json.loads((here / "tokens/tokens.json").read_text())["train"][0]["tokens"] > 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("nowhere/", "matches no text file"),
        ("empty", "matches no text file"),
        ("one.txt", "has too few documents for its train part; use more text"),
        ("'my texts' --tokenizer nothing", "tokenizer='nothing'; use 'bytes', or 'bpe:N'"),
        ("'my texts' --tokenizer bpe:7", "tokenizer='bpe:7'; use"),
        ("'my texts' --workers 0", "--workers"),
        (".", "--out tokens lies in ., where it would be read as text; give another --out"),
        ("'my texts' --out 'my texts/tokens'", "--out my texts/tokens lies in my texts"),
        ("'my texts' --out .", "exists and is not overwritten"),
        ("tokens.json", "matches no text file"),
        ("'my texts' --out one.txt/x", "one.txt/x: Not a directory"),
    ],
)  # fmt: skip
def test_invalid_input_is_refused_and_leaves_no_files(here: Path, line: str, said: str) -> None:
    Path("empty").mkdir()
    Path("one.txt").write_text("a word")
    before = sorted(here.rglob("*"))
    done = run(f"tokenize {line}")
    assert done.exit_code == 2 and said in " ".join(re.sub("[│╭╮╰╯─]", " ", done.stderr).split()), done.output
    assert sorted(here.rglob("*")) == before
