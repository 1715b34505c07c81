"""``mythos diagnose``."""

import json
import re
import sys

import numpy as np
import pytest
from fabricated import fabricate_run
from helpers import ATTENTION, tiny_model, tokens
from typer.testing import CliRunner

from open_mythos import plots
from open_mythos.checkpoint import SHIPPED
from open_mythos.cli import app
from open_mythos.cli.console import si
from open_mythos.cli.diagnose import bars, symbols
from open_mythos.diagnostics import cache_bytes_per_token, trace


def run(*arguments):
    return CliRunner().invoke(app, ["diagnose", *map(str, arguments)])


@pytest.fixture
def checkpoint(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_diagnose_prints_the_results_of_trace(attn_type, tmp_path):
    model = tiny_model(attn_type)
    model.save_pretrained(tmp_path)
    ids = tokens(1, 20)
    result = run(tmp_path, "--loops", 6, "--prompt", " ".join(map(str, ids[0].tolist())))
    assert result.exit_code == 0, result.output
    found = trace(model, ids, 6)
    used = found.loops_used[0].tolist()
    assert " ".join(map(str, used[:16])) in result.output and " ".join(map(str, used[16:])) in result.output
    assert re.search(rf"cache +│ +{si(20 * cache_bytes_per_token(model.cfg, 6, 4), 'B')}", result.output)
    assert f"{found.delta[0].mean():.4f}" in result.output and f"{found.delta[5].max():.4f}" in result.output
    assert f"--loops {2 * model.cfg.max_loop_iters}" in result.output
    assert "6 loops over 20 tokens (prompt)" in " ".join(result.output.split())


def test_random_input_is_reproducible(checkpoint):
    first, second = run(checkpoint), run(checkpoint)
    assert first.exit_code == 0 and first.output == second.output
    assert "random, seed 0" in " ".join(first.output.split())


def test_the_example_of_the_checkpoint_is_used_unless_a_prompt_is_given(checkpoint):
    (checkpoint / "example.json").write_text(json.dumps({"tokens": [1, 2, 1, 1]}))
    assert "over 4 tokens (example.json)" in " ".join(run(checkpoint).output.split())
    assert "over 2 tokens (prompt)" in " ".join(run(checkpoint, "--prompt", "1, 2").output.split())


def test_plots_are_written_to_the_given_folder(checkpoint, tmp_path):
    result = run(checkpoint, "--plots", tmp_path / "pictures")
    assert result.exit_code == 0, result.output
    names = {"state_change.png", "loops_used.png", "halting.png", "expert_load.png"}
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == names
    assert "Plots are in" in result.output


def test_plots_label_tokens_with_their_text(tmp_path, monkeypatch):
    """The task or the tokenizer of a run gives the labels; the input is a problem of that task."""
    drawn = {}
    monkeypatch.setattr(plots, "halting_map", lambda values, path, words, *more: drawn.update({path.name: words}))
    fabricate_run(tmp_path / "run")
    result = run(tmp_path / "run", "--plots", tmp_path)
    assert "8 tokens (a problem of parity, seed 0), gate on" in " ".join(result.output.split()), result.output
    assert drawn["halting.png"] == drawn["loops_used.png"] and set(drawn["halting.png"]) == {"0", "1"}
    assert symbols(SHIPPED / "text-tiny", [1 + byte for byte in b"a \n\xc3"]) == ["a", "␣", r"\n", r"\ufffd"]
    assert symbols(SHIPPED / "parity-tiny", [1, 2, 7]) == ["0", "1", "7"], "an id that the task does not have"
    assert symbols(tmp_path, [3, 1]) == ["3", "1"]


def test_a_model_without_a_gate_has_no_halting_plot(tmp_path):
    tiny_model(halting=False).save_pretrained(tmp_path / "model")
    result = run(tmp_path / "model", "--plots", tmp_path / "p")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "p").iterdir()} == {"state_change.png", "expert_load.png"}
    assert "no early exit" in " ".join(result.output.split()) and "gate, mean" not in result.output


def test_loops_after_all_positions_halted_show_no_state_change(tmp_path):
    tiny_model(gate_bias=9.0).save_pretrained(tmp_path / "model")
    result = run(tmp_path / "model", "--plots", tmp_path)
    assert result.exit_code == 0, result.output
    assert re.search(r"2 +│ +0 │ +- │ +- │", result.output)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "--prompt is empty; give it a value"),
        ("1 two", "--prompt holds 'two'; token ids of this model are integers from 0 to 22"),
        ("1 23", "--prompt holds 23"),
        ("-1", "--prompt holds -1"),
        ("1 " * 33, "33 positions (0 before, 33 new) do not fit max_seq_len=32"),
    ],
)
def test_an_invalid_prompt_is_one_line_on_stderr(checkpoint, prompt, message):
    check_failure(run(checkpoint, "--prompt", prompt), message)


@pytest.mark.parametrize("text", ['{"token": [1]}', "[1]", '{"tokens": 3}', "{", '{"tokens": [1.5]}'])
def test_an_invalid_example_is_one_line_on_stderr(checkpoint, text):
    (checkpoint / "example.json").write_text(text)
    check_failure(run(checkpoint), "example.json")


def test_an_invalid_checkpoint_is_one_line_on_stderr(checkpoint, tmp_path):
    check_failure(run(tmp_path / "nowhere"), "nowhere is neither a directory nor a shipped model")
    (checkpoint / "model.safetensors").write_bytes(b"no")
    check_failure(run(checkpoint), "model.safetensors is truncated or not a safetensors file")


def test_missing_matplotlib_is_one_line_on_stderr(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    check_failure(run(checkpoint, "--plots", tmp_path / "p"), 'pip install ".[plots]"')


def test_zero_loops_is_a_usage_error(checkpoint):
    result = run(checkpoint, "--loops", 0)
    assert result.exit_code == 2 and "--loops" in result.stderr


def check_failure(result, message):
    assert result.exit_code == 2 and not result.stdout
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_bars_are_scaled_to_the_maximum():
    assert bars(np.array([0.0, 4.0, 8.0])) == " ▄█"
    assert bars(np.zeros(3)) == "   "
    assert len(bars(np.ones(100))) == 32
