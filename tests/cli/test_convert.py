"""``mythos convert``."""

import pytest
import torch
from typer.testing import CliRunner

from open_mythos import OpenMythos
from open_mythos.cli import app


def run(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def flat(result) -> str:
    return " ".join((result.output + result.stderr).split())


@pytest.fixture(scope="module")
def source(reference_checkpoints):
    return reference_checkpoints / "training.pt"


def test_convert_reports_what_it_folded_set_and_saved(source, tmp_path):
    result = run(source, tmp_path / "model")
    text = flat(result)
    assert result.exit_code == 0, text
    for said in (
        "GQA, 4 heads, rope_theta=10000", "Folded: 2 shared experts into one of width 36", "recurrence='mixture'",
        "router_score='softmax'", "loop_index_dim=5", f"Model: {tmp_path}/model;", "Next: mythos info",
    ):  # fmt: skip
        assert said in text
    expected = torch.load(source.with_name("training.pt.expected"))
    with torch.no_grad():
        found = OpenMythos.from_pretrained(tmp_path / "model")(expected["ids"], 3)
    assert (found - expected["whole"][3]).abs().max() < 1e-4
    for command in ("info", "diagnose"):
        looked = CliRunner().invoke(app, [command, str(tmp_path / "model")])
        assert looked.exit_code == 0, flat(looked)


def test_a_bare_state_dict_needs_the_missing_settings(source, tmp_path):
    bare, out = source.with_name("state_dict.pt"), tmp_path / "out"
    failed = run(bare, out)
    assert failed.exit_code == 2 and "--set act_threshold=0.99" in flat(failed) and not out.exists()
    assert run(bare, out, "--set", "act_threshold=0.99").exit_code == 0


def test_an_existing_model_is_overwritten_only_with_overwrite(source, tmp_path):
    assert run(source, tmp_path).exit_code == 0
    again = run(source, tmp_path)
    assert again.exit_code == 2 and "give --overwrite" in flat(again)
    assert run(source, tmp_path, "--overwrite").exit_code == 0
    folder = source.with_name("safetensors")
    before = (folder / "config.json").read_bytes()
    itself = run(folder, folder, "--overwrite")
    assert itself.exit_code == 2 and "contains the source" in flat(itself)
    assert (folder / "config.json").read_bytes() == before
    file = run(source, folder / "config.json")
    assert file.exit_code == 2 and "is a file; give a directory" in flat(file)
