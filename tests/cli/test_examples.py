"""The example at the end of each command's help runs as printed, and shell completion works."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from open_mythos.cli import COMMANDS, app

# Options that shorten a run; everything else is run as it is printed.
QUICK = {
    "demo": ["--steps", "2"],
    "eval": ["--examples", "2"],
    "compare": ["steps=2", "evaluation.examples=4"],
    "train": ["steps=2"],
    "bench": ["--seconds", "0"],
}


def example_of(command: str) -> list[str]:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    found = re.fullmatch(r"Example: mythos (.+)", shown.strip().splitlines()[-1].strip())
    assert found, shown
    return shlex.split(found[1])


def llama(where: Path) -> None:
    """A tiny Llama with as many layers as that of the example, and a tokenizer for it."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    from open_mythos.cli.retrofit import SAMPLE

    words = {word: i for i, word in enumerate(["[UNK]", *sorted(set(re.findall(r"\w+|[^\w\s]+", SAMPLE)))])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]").save_pretrained(where)
    cfg = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=30, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, max_position_embeddings=128,
    )  # fmt: skip
    transformers.LlamaForCausalLM(cfg).save_pretrained(where)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_in_a_commands_help_runs(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    words = example_of(command)
    assert words[0] == command
    monkeypatch.chdir(tmp_path)
    if command == "retrofit":  # instead of a download from the hub
        llama(tmp_path / words[1])
    elif command == "convert":
        (tmp_path / words[1]).symlink_to(request.getfixturevalue("reference_checkpoints") / "training.pt")
    done = CliRunner().invoke(app, [*words, *QUICK.get(command, [])], input="Depth\n")
    assert done.exit_code == 0, done.output


def complete(words: str, at: int) -> list[str]:
    """Completions that a shell would offer for word ``at``; fails if the command imports a heavy library."""
    code = (
        "import sys; from open_mythos.cli import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    asked = {"_MYTHOS_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(at)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | asked)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_shell_completion_works_without_importing_torch() -> None:
    assert complete("mythos ", 1) == list(COMMANDS)
    assert complete("mythos tr", 1) == ["train", "train-gate"]
    assert complete("mythos eval --ex", 2) == ["--examples", "--exit"]


def test_mythos_without_arguments_shows_an_introduction_and_commands_to_try() -> None:
    done = CliRunner().invoke(app, [])
    assert done.exit_code == 0 and "the same block of weights in a loop" in done.output
    tried = re.findall(r"^  mythos (\S+)", done.output, re.MULTILINE)
    assert len(tried) > 3 and set(tried) <= {*COMMANDS, "--help"}
