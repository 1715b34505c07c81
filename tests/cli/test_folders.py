"""Every folder that a command writes is accepted by all commands that can read it, and suggested commands run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from walk import mythos, walk

from open_mythos import OpenMythos

for package in ("transformers", "tokenizers", "matplotlib"):
    pytest.importorskip(package)

LOOPED = [
    "demo", "demo pretrained", "a run", "a run/model", "text", "compare/looped-seed0", "gate", "exported",
    "exported text", "converted", "retrofit",
]  # fmt: skip
BASELINES = ["compare/single-seed0", "compare/unrolled-seed0"]
TEXT = ["text", "exported text", "retrofit"]
TAKERS = {
    "info": "mythos info '{}'",
    "diagnose": "mythos diagnose '{}'",
    "bench": "mythos bench '{}' --only prefill --tokens 8 --seconds 0",
    "eval": "mythos eval '{}' --loops 1,2 --examples 2 --out evaluated",
    "report": "mythos report '{}' --out page.html",
    "export": "mythos export '{0}' '{0}-exported'",
    "train-gate": "mythos train-gate '{0}' --steps 1 --loops 2 --max-difficulty 24 --out '{0}-a-gate'",
    "chat": "mythos chat '{}' --max-tokens 1",
    "train": "mythos train debug gate.steps=0 'start={}' --dry-run",
    "heal": "mythos train heal 'start={}' 'data=texts/*.txt' length=16 --dry-run",
}
# combinations that are refused, and the reason in the error
REFUSED: dict[tuple[str, str], str] = {
    **{("chat", folder): "is not a text model" for folder in [*LOOPED, *BASELINES] if folder not in TEXT},
    **{("heal", folder): "but text has" for folder in LOOPED if folder not in TEXT},
    **{("train-gate", folder): "this is a baseline" for folder in BASELINES},
    **{("train-gate", folder): "look inside with mythos diagnose" for folder in ("converted", "retrofit")},
    **{
        ("report", folder): "measure it on a task of your choice with mythos eval --task"
        for folder in ("converted", "retrofit")
    },
    ("eval", "converted"): "mythos eval --task",
    ("export", "compare/unrolled-seed0"): "is a baseline, which has no loop",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, reference_checkpoints: Path) -> Iterator[dict[str, str]]:
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("walk"))
    yield walk(reference_checkpoints / "training.pt")
    os.chdir(before)


@pytest.mark.parametrize("command", TAKERS)
def test_each_folder_is_accepted_or_refused_with_a_reason(made: dict[str, str], command: str) -> None:
    folders = LOOPED if command in ("train", "heal") else [*LOOPED, *BASELINES]
    for folder in folders:
        done, reason = mythos(TAKERS[command].format(folder), said="hi\n"), REFUSED.get((command, folder))
        assert done.exit_code == (0 if reason is None else 2), (folder, done.output, done.exception)
        assert reason is None or reason in done.stderr.splitlines()[-1], (folder, done.stderr)


def test_a_run_loads_in_python_and_a_folder_of_runs_is_refused(made: dict[str, str]) -> None:
    assert OpenMythos.from_pretrained("demo").cfg.vocab_size == 3
    assert (
        "contains several runs; give one of them, such as compare/looped-seed0"
        in mythos("mythos report compare").stderr
    )


def next_lines(printed: str) -> list[str]:
    """The commands printed in bold in lines with "Next"."""
    lines = [line for line in printed.splitlines() if "Next" in line]
    return [found for line in lines for found in re.findall("\x1b\\[1m(.*?)\x1b\\[0m", line)]


def test_every_suggested_next_command_runs_as_printed(made: dict[str, str]) -> None:
    printed = dict(made)
    for line in (
        "mythos train", "mythos train debug steps=2 --resume auto --out 'a new run' --dry-run", "mythos chat text",
        "mythos info 1b", "mythos info 'a run'", "mythos eval text --examples 2", "mythos eval gate --examples 2",
        "mythos report text", "mythos report 'a run'", "mythos diagnose 'a run'",
        "mythos diagnose compare/unrolled-seed0",
    ):  # fmt: skip
        printed[line] = mythos(line).stdout
    assert "--resume auto" in printed["mythos train debug steps=2 --resume auto --out 'a new run' --dry-run"]
    assert "--difficulty" not in printed["mythos report text"]
    to_type = {line for text in printed.values() for line in next_lines(text)}
    assert {line.split()[1] for line in to_type} == {
        "demo", "diagnose", "report", "eval", "train", "chat", "info"
    }, to_type  # fmt: skip
    assert all(next_lines(text) for name, text in printed.items() if not name.startswith("exported"))
    Path("runs").mkdir()
    Path("runs/demo").symlink_to(Path("demo").resolve())  # what `mythos demo` would have written
    for line in sorted(to_type - {"mythos demo"}):
        done = mythos(line, *(["--dry-run"] if line.startswith("mythos train") else []))
        assert done.exit_code == 0, (line, done.output, done.exception)
