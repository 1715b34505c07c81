"""``mythos bench``."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import tiny_model
from typer.testing import CliRunner

from open_mythos.cli import app, timed
from open_mythos.diagnostics import machine, speed

QUICK = ("--batch", 2, "--tokens", 8, "--seconds", 0)
SHAPE = ("--dim", 64, "--experts", 2, "--loops", 2)


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def measured(*arguments):
    result = run(*arguments, *QUICK)
    assert result.exit_code == 0, result.output + result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result.stdout


@pytest.mark.parametrize("attn", ["gqa", "mla"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bench_prints_a_table_and_a_line_of_json(attn, dtype):
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


def test_only_limits_the_measurement_to_one_workload():
    found, _ = measured(*SHAPE, "--only", "decode")
    assert list(found["works"]) == ["decode"]


def test_bench_accepts_a_saved_model_a_shipped_model_or_a_variant(tmp_path):
    tiny_model(max_seq_len=8).save_pretrained(tmp_path)  # shorter than the benchmark needs
    assert measured(tmp_path, "--only", "decode")[0]["config"]["dim"] == 32
    assert measured("parity-tiny", "--only", "prefill")[0]["model"] == "parity-tiny"
    found, _ = measured("nano", "--loops", 3, "--only", "train")
    assert found["config"]["dim"] == 64 and found["works"]["train"]["n_loops"] == 3


def test_bench_measures_without_halting():
    found, _ = measured("parity-tiny", "--only", "prefill")
    assert found["config"]["halting"] is False


def test_price_per_million_tokens_follows_from_the_measured_speed():
    found, shown = measured("nano", "--price", 0.5)
    rows = found["prices"]["rows"]
    assert [row["n_loops"] for row in rows] == [1, 2, 4, 8] and found["prices"]["per_hour"] == 0.5
    assert found["config"]["max_loop_iters"] == 8
    for row in rows:
        assert list(row["per_million_tokens"]) == ["train", "prefill", "decode"]
        for work, money in row["per_million_tokens"].items():
            assert money == pytest.approx(0.5 * (1e6 / row["tokens_per_second"][work]) / 3600)
            assert f"{money:.3g}" in shown
    for work, one in found["works"].items():
        assert one["n_loops"] == 8 and one["tokens_per_second"] == rows[-1]["tokens_per_second"][work]
    assert "1 loop " in shown and "No dense model of the same quality was measured" in " ".join(shown.split())
    assert "prices" not in measured("nano", "--only", "decode")[0]


def test_prices_use_the_given_loops():
    found, _ = measured(*SHAPE[:4], "--loops", 3, "--price", 2, "--only", "decode")
    (row,) = found["prices"]["rows"]
    assert row["n_loops"] == 3 and list(row["per_million_tokens"]) == ["decode"] and row["bits_per_byte"] is None


def test_a_dense_model_of_equal_quality_is_timed_in_the_same_run(monkeypatch):
    made, plain = [], speed.prefill_speed

    def watched(model, *rest):
        made.append((model.cfg.dim, model.cfg.max_loop_iters))  # up to which training explores loops
        return plain(model, *rest)

    monkeypatch.setattr(timed, "prefill_speed", watched)
    found, shown = measured("800k", "--price", 2, "--only", "prefill")
    rows = found["prices"]["rows"]
    assert [(row["model"], row["n_loops"]) for row in rows] == [("looped", n) for n in (1, 2, 4, 8)] + [("dense", 1)]
    assert [row["bits_per_byte"] for row in rows] == [2.142, 2.111, 2.112, 2.114, 2.116]
    assert made == [(128, 1), (128, 2), (128, 4), (128, 8), (192, 1)] and "dense, 6 layers" in shown
    wider, _ = measured("--dim", 128, "--loops", 1, "--price", 2, "--only", "prefill")
    assert len(wider["prices"]["rows"]) == 1, "no dense counterpart is known for another shape"


@pytest.mark.parametrize("price", ["0", "-1", "nan", "inf", "much"])
def test_an_invalid_price_is_refused_before_anything_is_timed(price, monkeypatch):
    monkeypatch.setattr(machine, "matmul_rate", lambda *_: pytest.fail("something was timed"))
    result = run("nano", "--price", price, *QUICK)
    assert result.exit_code == 2 and "--price" in result.stderr
    assert price == "much" or "above 0, as in --price 2.50" in " ".join(result.stderr.split())


@pytest.mark.parametrize("arguments, message", [
    (["nano", "--dim", 64], "leave out --dim, or leave out the model"),
    (["--dim", 100], "use 64"),
    (["no-such-variant"], "unknown variant"),
    (["nano", "--device", "abacus"], "--device 'abacus' is not available here"),
])  # fmt: skip
def test_invalid_options_are_refused(arguments, message):
    result = run(*arguments, *QUICK)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
