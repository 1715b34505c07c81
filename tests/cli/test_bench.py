"""``mythos bench``."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import tiny_model
from typer.testing import CliRunner

from open_mythos.cli import app
from open_mythos.diagnostics import machine

QUICK = ("--batch", 2, "--tokens", 8, "--seconds", 0)
SHAPE = ("--dim", 64, "--experts", 2, "--loops", 2)


@pytest.fixture(autouse=True)
def small_peaks(monkeypatch):
    monkeypatch.setattr(machine, "MATMULS", ((64, 64, 64), (64, 64, 64)))
    monkeypatch.setattr(machine, "_READ_BYTES", {"cpu": 2**16})


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def measured(*arguments):
    result = run(*arguments, *QUICK)
    assert result.exit_code == 0, result.output + result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result.stdout


@pytest.mark.parametrize("attn", ["gqa", "mla"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_table_for_people_and_a_line_for_programs(attn, dtype):
    found, shown = measured(*SHAPE, "--attn", attn, "--dtype", dtype)
    assert list(found["works"]) == ["train", "prefill", "decode"]
    assert found["config"]["attn_type"] == attn and found["config"]["n_experts"] == 2
    assert found["conditions"]["dtype"] == dtype and found["conditions"]["threads"] == torch.get_num_threads()
    peaks = found["peaks"]
    for name, one in found["works"].items():
        assert one["n_loops"] == 2 and one["batch"] == 2 and one["tokens"] == 8 and len(one["seconds"]) >= 3
        rate = one["flops"] / one["per_repetition"] * one["tokens_per_second"]
        assert one["flops_share"] == pytest.approx(rate / peaks["matmul_flops_per_second"])
        assert (one["bytes_share"] is not None) == (name == "decode")
        assert f"{one['tokens_per_second']:,.0f}" in shown


def test_one_work_alone():
    found, _ = measured(*SHAPE, "--only", "decode")
    assert list(found["works"]) == ["decode"]


def test_a_saved_model_a_shipped_one_and_a_variant(tmp_path):
    tiny_model(max_seq_len=8).save_pretrained(tmp_path)  # the bench needs room for more
    assert measured(tmp_path, "--only", "decode")[0]["config"]["dim"] == 32
    assert measured("parity-tiny", "--only", "prefill")[0]["model"] == "parity-tiny"
    found, _ = measured("nano", "--loops", 3, "--only", "train")
    assert found["config"]["dim"] == 64 and found["works"]["train"]["n_loops"] == 3


def test_every_position_runs_every_loop():
    found, _ = measured("parity-tiny", "--only", "prefill")
    assert found["config"]["halting"] is False


@pytest.mark.parametrize("arguments, message", [
    (["nano", "--dim", 64], "leave out --dim, or the model"),
    (["--dim", 100], "use 64"),
    (["no-such-variant"], "unknown variant"),
    (["nano", "--device", "abacus"], "--device 'abacus' is not to be had here"),
])  # fmt: skip
def test_what_does_not_fit_is_one_line(arguments, message):
    result = run(*arguments, *QUICK)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
