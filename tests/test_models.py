"""A model, its tokenizer and its card are found by run, directory or name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_model

from open_mythos import checkpoint, models
from open_mythos.models import card_of, home_dir, load_model, model_dir, save_model, tokenizer_of
from open_mythos.training.baselines import UnrolledMythos


def test_a_model_is_found_by_its_run_or_its_own_directory(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    assert model_dir(tmp_path) == model_dir(tmp_path / "model") == tmp_path / "model"
    model = load_model(str(tmp_path))
    assert model.cfg.dim == 32 and not model.training


def test_a_folder_called_model_is_a_runs_only_beside_what_a_run_writes(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    assert home_dir(tmp_path / "model") == tmp_path / "model" and home_dir(tmp_path) == tmp_path
    (tmp_path / "evaluation.json").write_text("{}")
    assert home_dir(tmp_path / "model") == tmp_path


def test_sharded_weights_are_loaded(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    weights = ", ".join(f'"{name}": "part.safetensors"' for name in tiny_model().state_dict())
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{weights}}}}}')
    assert load_model(tmp_path).cfg.dim == 32


def test_a_shipped_model_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "SHIPPED", tmp_path)
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path)
    tiny_model().save_pretrained(tmp_path / "parity-tiny")
    assert model_dir("parity-tiny") == tmp_path / "parity-tiny"
    with pytest.raises(ValueError, match="'parity-tiny'"):
        model_dir("parity-tniy")


def test_errors_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is neither a run nor a model"):
        model_dir(tmp_path)
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match="the run has not finished; continue it with --resume auto"):
        model_dir(tmp_path)
    with pytest.raises(
        ValueError, match=r"a/b is neither a directory nor a shipped .* hf download a/b --local-dir FOLDER"
    ):
        model_dir("a/b")
    with pytest.raises(ValueError, match="nowhere is neither a directory nor a shipped model"):
        model_dir("nowhere")


def test_a_baseline_is_loaded_with_its_own_class(tmp_path: Path) -> None:
    UnrolledMythos(tiny_model().cfg).save_pretrained(tmp_path)
    (tmp_path / "training.json").write_text('{"kind": "unrolled"}')
    assert type(load_model(tmp_path)) is UnrolledMythos
    for damaged in ("{", "[]", "{}"):
        (tmp_path / "training.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"training.json does not say how the model was trained"):
            load_model(tmp_path)


def test_the_tokenizer_is_saved_with_the_model_and_the_card_is_read(tmp_path: Path) -> None:
    save_model(load_model("text-tiny"), tmp_path / "text", "text-tiny")
    assert tokenizer_of(tmp_path / "text").encode(["no"]).tolist() == tokenizer_of("text-tiny").encode(["no"]).tolist()
    assert "# text-tiny" in card_of("text-tiny")
    with pytest.raises(
        ValueError, match=r"README.md is missing, so .*text has no model card; for a run, see mythos report"
    ):
        card_of(tmp_path / "text")
    save_model(tiny_model(), tmp_path / "bare")
    with pytest.raises(ValueError, match=r"bare has no tokenizer.json, so .*bare is not a text model"):
        tokenizer_of(tmp_path / "bare")


def test_loading_and_generating_import_no_training_code_and_no_compiler() -> None:
    """Importing torch's compiler takes two seconds."""
    code = (
        "import sys, torch; from open_mythos import MythosConfig, OpenMythos\n"
        "from open_mythos.models import card_of, load_model, tokenizer_of\n"
        "load_model('text-tiny'), tokenizer_of('text-tiny'), card_of('text-tiny')\n"
        "sizes = dict(vocab_size=9, dim=32, n_heads=4, n_kv_heads=2, n_experts=4, expert_dim=8, attn_type='gqa')\n"
        "OpenMythos(MythosConfig(**sizes)).generate(torch.ones(2, 9, dtype=torch.long), 2, 2)\n"
        "assert not [name for name in sys.modules if name.startswith(('open_mythos.training', 'torch._dynamo'))]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
