"""Saving and loading: a loaded model gives identical logits, and errors name the bad file."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import ATTENTION, assert_near, tiny_model, tokens
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrizations, prune

from open_mythos import CheckpointError, MythosConfig, OpenMythos, files, weights


@pytest.fixture
def saved(tmp_path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("changes", [
    {}, dict(lora_rank=0, conv_taps=0, n_shared_experts=0), dict(prelude_layers=0, coda_layers=2, state_norm=False),
    dict(core_layers=2, n_experts=0, tied_head=False),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_a_loaded_model_gives_identical_logits(tmp_path, attn_type, changes):
    model, ids = tiny_model(attn_type, **changes), tokens(2, 8)
    model.train()(ids, 3)  # so that expert counts and trained loops are set
    model.eval().save_pretrained(tmp_path)
    loaded = OpenMythos.from_pretrained(tmp_path)
    assert not loaded.training and loaded.cfg == model.cfg and type(loaded) is OpenMythos
    assert (loaded.head.weight is loaded.embed.weight) == model.cfg.tied_head
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with torch.no_grad():
        for n_loops in (1, 4, 9):
            assert torch.equal(loaded(ids, n_loops), model(ids, n_loops))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_kept_and_the_router_bias_stays_float32(tmp_path, dtype):
    model = tiny_model().to(dtype)
    model.save_pretrained(str(tmp_path))  # a str works as well as a Path
    loaded = OpenMythos.from_pretrained(str(tmp_path))
    assert loaded.embed.weight.dtype == dtype
    assert torch.equal(loaded.recurrent.block.ffn.router_bias, model.recurrent.block.ffn.router_bias)
    assert loaded.recurrent.block.ffn.router_bias.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(loaded(tokens(1, 5)), model(tokens(1, 5)))


def test_a_saved_model_is_two_files_without_pickle(saved):
    assert sorted(os.listdir(saved)) == ["config.json", "model.safetensors"]
    assert MythosConfig.from_dict(json.loads((saved / "config.json").read_text())).dim == 32
    assert not zipfile.is_zipfile(saved / "model.safetensors")
    assert "head.weight" not in load_file(saved / "model.safetensors")


def test_config_and_weights_have_the_same_file_permissions(saved):
    assert (saved / "model.safetensors").stat().st_mode == (saved / "config.json").stat().st_mode


def test_loading_never_unpickles(saved, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    OpenMythos.from_pretrained(saved)


def test_saving_replaces_an_earlier_model_and_creates_folders(tmp_path):
    directory = tmp_path / "a" / "b"
    tiny_model(seed=1).save_pretrained(directory)
    second = tiny_model(seed=2)
    second.save_pretrained(directory)
    assert torch.equal(OpenMythos.from_pretrained(directory).embed.weight, second.embed.weight)
    assert sorted(os.listdir(directory)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        OpenMythos.from_pretrained(saved)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        OpenMythos.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights_are_named(saved, keep):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        OpenMythos.from_pretrained(saved)


@pytest.mark.parametrize("content", [b"not a checkpoint at all", pickle.dumps({"embed.weight": 1}), b"\x00" * 64])
def test_weights_in_another_format_are_named(saved, content):
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        OpenMythos.from_pretrained(saved)


def test_weights_of_another_model_are_named(saved):
    save_file({"transformer.wte.weight": torch.zeros(3, 4)}, saved / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not .*lacks .*'.*' .*'transformer\.wte\.weight'"):
        OpenMythos.from_pretrained(saved)


def test_missing_and_extra_tensors_are_named(saved):
    tensors = load_file(saved / "model.safetensors")
    gone = tensors.pop("norm.weight")
    save_file(tensors, saved / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*lacks 1 tensor.*norm\.weight"):
        OpenMythos.from_pretrained(saved)
    save_file({**tensors, "norm.weight": gone, "extra": gone.clone()}, saved / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*has 1 unexpected tensor.*extra"):
        OpenMythos.from_pretrained(saved)


def test_a_tensor_under_two_names_is_refused(saved):
    tensors = load_file(saved / "model.safetensors")
    embed = next(tensor for name, tensor in tensors.items() if name.endswith("embed.weight"))
    save_file(tensors | {"embed.weight": embed, "core.embed.weight": embed + 1}, saved / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors has '.*embed.weight', but there is another"):
        OpenMythos.from_pretrained(saved)


def test_a_shape_mismatch_names_weights_and_config(saved):
    cfg = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**cfg, "vocab_size": 24}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not fit .*config\.json"):
        OpenMythos.from_pretrained(saved)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"dim": -3}', b'{"model_type": "llama"}', b"\xff\xfe\x00"])
def test_an_invalid_config_file_is_named(saved, content):
    (saved / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        OpenMythos.from_pretrained(saved)


@pytest.mark.parametrize("max_loop_iters", [2, 3, 9])
@pytest.mark.parametrize("edit", ["after loading", "in the file", "before saving"])
def test_max_loop_iters_and_max_seq_len_may_change(tmp_path, edit, max_loop_iters):
    model, ids = tiny_model(max_seq_len=8, max_loop_iters=6), tokens(2, 8)
    model.recurrent.lora.trained_loops.fill_(6)
    with torch.no_grad():
        expected = model(ids, 2)
    if edit == "before saving":
        model.cfg.max_seq_len, model.cfg.max_loop_iters = 20, max_loop_iters
    model.save_pretrained(tmp_path)
    if edit == "in the file":
        cfg = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**cfg, "max_seq_len": 20, "max_loop_iters": max_loop_iters}))
    loaded = OpenMythos.from_pretrained(tmp_path)
    if edit == "after loading":
        loaded.cfg.max_seq_len, loaded.cfg.max_loop_iters = 20, max_loop_iters
    with torch.no_grad():
        assert_near(loaded(ids, 2), expected, 0.0)
        assert_near(loaded(tokens(1, 20)), loaded(tokens(1, 20), max_loop_iters), 0.0)
        assert loaded(tokens(1, 20), 12).isfinite().all()
        assert loaded.generate(ids, 12, n_loops=7).shape == (2, 20)


def test_lowering_max_loop_iters_before_saving_does_not_change_deeper_loops(tmp_path):
    model, ids = tiny_model(max_loop_iters=6, halting=False), tokens(2, 8)
    model.recurrent.lora.trained_loops.fill_(6)
    model.cfg.max_loop_iters = 2
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert_near(OpenMythos.from_pretrained(tmp_path)(ids, 6), model(ids, 6), 0.0)


def test_a_loaded_model_can_be_trained_further(tmp_path):
    tiny_model(max_loop_iters=3).save_pretrained(tmp_path)
    model = OpenMythos.from_pretrained(tmp_path).train()
    model.cfg.max_loop_iters = 8
    model(tokens(2, 5)).square().mean().backward()
    assert model.recurrent.block.ffn.gate_up.grad.isfinite().all()


@pytest.mark.parametrize("at", ["a shard", "the config"])
def test_a_full_disk_leaves_the_earlier_model_as_it_was(tmp_path, monkeypatch, at):
    first, second = tiny_model(), tiny_model(rope_theta=100.0)
    first.save_pretrained(tmp_path, max_shard_size="40KB")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls, write, write_json = [0], weights.write, files.write_json

    def full_at_the_third(*args, **options):
        calls[0] += 1
        if calls[0] == 3:
            raise OSError(28, "No space left on device")
        return write(*args, **options)

    def full(path, *args, **options):
        if path.name == "config.json":
            raise OSError(28, "No space left on device")
        return write_json(path, *args, **options)

    if at == "a shard":
        monkeypatch.setattr(weights, "write", full_at_the_third)
    else:
        monkeypatch.setattr(files, "write_json", full)
    with pytest.raises(OSError, match="No space left"):
        second.save_pretrained(tmp_path, max_shard_size="40KB")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_weights_in_parts_are_not_saved(tmp_path):
    for i, change in enumerate((prune.random_unstructured, parametrizations.weight_norm)):
        model = tiny_model()
        change(model.recurrent.block.attn.wo, "weight", *([0.5] if change is prune.random_unstructured else []))
        with pytest.raises(CheckpointError, match=r"recurrent.block.attn.wo.*weight.* is a part of a pruned or param"):
            model.save_pretrained(tmp_path / str(i))
        assert not (tmp_path / str(i)).exists()


def test_a_checkpoint_error_is_a_value_error():
    assert issubclass(CheckpointError, ValueError)
