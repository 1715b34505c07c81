"""One folder format: what this library or transformers saves, both load; other folders are refused."""

import json
import shutil

import pytest
import torch
import transformers
from helpers import ATTENTION, assert_near, tiny_model
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)
from wrapped import prompts, wrapped

from open_mythos import CheckpointError, OpenMythos
from open_mythos.integrations.hf import OpenMythosForCausalLM, OpenMythosModel

IDS = prompts(2, 8)


@pytest.fixture
def saved(tmp_path):
    wrapped().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("attn_type", ATTENTION)
@torch.no_grad()
def test_folders_round_trip_between_this_library_and_transformers(tmp_path, attn_type):
    core = tiny_model(attn_type)
    core.save_pretrained(tmp_path / "ours")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(lm) is OpenMythosForCausalLM and not lm.training
    lm.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", num_loops=9)
    ours = OpenMythos.from_pretrained(tmp_path / "theirs")
    model = AutoModel.from_pretrained(tmp_path / "theirs")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1 and type(model) is OpenMythosModel
    assert ours.cfg == core.cfg and again.config.num_loops == 9
    assert AutoConfig.from_pretrained(tmp_path / "ours").dim == 32
    for found in (lm(IDS).logits, ours(IDS), ours.head(model(IDS).last_hidden_state), again(IDS, num_loops=4).logits):
        assert_near(found, core(IDS))
    assert_near(again(IDS).logits, core(IDS, 9))


@torch.no_grad()
def test_a_lora_table_longer_or_shorter_than_the_loops_round_trips(tmp_path):
    for n, max_loop_iters in enumerate((2, 9)):
        core = tiny_model(max_loop_iters=6)
        core.cfg.max_loop_iters = max_loop_iters
        core.save_pretrained(tmp_path / str(n))
        lm = AutoModelForCausalLM.from_pretrained(tmp_path / str(n))
        lm.save_pretrained(tmp_path / "back")
        assert lm.config.num_loops == max_loop_iters
        assert_near(lm(IDS).logits, core(IDS))
        assert_near(lm(IDS, num_loops=6).logits, core(IDS, 6))
        assert_near(OpenMythos.from_pretrained(tmp_path / "back")(IDS, 6), core(IDS, 6))


@torch.no_grad()
def test_half_precision_keeps_the_router_bias_in_float32(saved, tmp_path):
    lm = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16, device_map="cpu")
    assert lm.dtype == torch.bfloat16 and lm.core.recurrent.block.ffn.router_bias.dtype == torch.float32
    lm.save_pretrained(tmp_path / "half")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    assert OpenMythos.from_pretrained(tmp_path / "half").embed.weight.dtype == torch.bfloat16
    fresh = AutoModelForCausalLM.from_config(lm.config, dtype=torch.bfloat16)
    assert fresh.core.recurrent.block.ffn.router_bias.dtype == torch.float32


def test_a_shipped_model_loads_with_its_own_or_a_new_head():
    lm = OpenMythosForCausalLM.from_pretrained("parity-tiny")
    assert lm.config.num_loops == lm.core.cfg.max_loop_iters == 24
    folder = lm.config.name_or_path
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    assert model(torch.ones(2, 5, dtype=torch.int64)).logits.shape == (2, 1) and model.score.weight.std() > 0


@pytest.mark.parametrize("edit, message", [
    (dict(depth_of_tomorrow=3), "unknown config field 'depth_of_tomorrow'.*newer open_mythos.*git pull"),
    (dict(format_version=2), "format_version=2: this config was written by a newer open_mythos.*git pull"),
    (dict(dim=33), "dim=33 is not divisible"),
    (dict(model_type="llama"), "model_type='llama' is another kind of model"),
])  # fmt: skip
def test_an_invalid_config_is_refused(saved, edit, message):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | edit))
    for load in (OpenMythos.from_pretrained, OpenMythosForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(saved)


def test_files_are_verified_before_transformers_reads_them(tmp_path):
    saved = tmp_path / "ours"
    tiny_model().save_pretrained(saved)
    weights = saved / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-5] + bytes([content[-5] ^ 64]) + content[-4:])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged"):
        AutoModelForCausalLM.from_pretrained(saved)
    weights.write_bytes(content)
    weights.rename(saved.parent / "outside.safetensors")
    weights.symlink_to(saved.parent / "outside.safetensors")
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        AutoModelForCausalLM.from_pretrained(saved)
    weights.unlink()
    index = {"weight_map": {"core.embed.weight": "../outside.safetensors"}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"outside.safetensors"):
        AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("field, value", [("prelude_layers", 10**7), ("dim", 10**9), ("vocab_size", 24)])
def test_a_config_of_another_size_than_the_weights_is_refused_before_a_model_is_made(saved, field, value):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(CheckpointError, match=rf"config.json has .*{field}={value}.*, but .*model.safetensors"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_tensors_of_other_shapes_are_not_left_without_values(saved):
    with pytest.raises(ValueError, match=r"ignore_mismatched_sizes=True would leave.*resize_token_embeddings"):
        AutoModelForCausalLM.from_pretrained(saved, vocab_size=40, ignore_mismatched_sizes=True)


def test_weights_of_another_architecture_are_refused(saved, tmp_path):
    sizes = dict(vocab_size=23, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match=r"model_type='llama' is another kind of model.*AutoModelForCausalLM"):
        OpenMythosForCausalLM.from_pretrained(tmp_path / "llama")
    shutil.copy(tmp_path / "llama" / "model.safetensors", saved)
    with pytest.raises(ValueError, match=r"is not a checkpoint of an open_mythos model: it lacks .* such as 'core"):
        AutoModelForCausalLM.from_pretrained(saved)
    with pytest.raises(
        CheckpointError, match=r"is not a checkpoint of this model: it lacks .*; load it with the class"
    ):
        OpenMythos.from_pretrained(saved)


def test_damaged_and_missing_files_are_named(saved):
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[:500])
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated or not a safetensors file .*again"):
        AutoModelForCausalLM.from_pretrained(saved)
    (saved / "config.json").unlink()
    with pytest.raises(OSError, match=r"config\.json is missing; download or save it again"):
        OpenMythosForCausalLM.from_pretrained(saved)


@torch.no_grad()
def test_a_failed_save_leaves_the_folder_unchanged(saved, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    other, calls, write = wrapped(seed=1), [0], transformers.modeling_utils.safe_save_file

    def fail_at_second_file(*args, **kwargs):
        calls[0] += 1
        if calls[0] == 2:
            raise SafetensorError("No space left on device (os error 28)")
        write(*args, **kwargs)

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", fail_at_second_file)
    with pytest.raises(OSError, match=f"No space left.*{saved.name}"):
        other.save_pretrained(saved, max_shard_size="40KB")
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@torch.no_grad()
def test_saving_again_removes_earlier_weights(saved):
    other = wrapped(seed=1)
    for size in ("40KB", "60KB", "1GB"):
        other.save_pretrained(saved, max_shard_size=size)
        for load in (
            AutoModelForCausalLM.from_pretrained,
            lambda path: OpenMythosForCausalLM.wrap(OpenMythos.from_pretrained(path)),
        ):
            assert_near(load(saved)(IDS).logits, other(IDS).logits)
    assert sorted(path.name for path in saved.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_saving_int8_weights_is_refused(tmp_path):
    pytest.importorskip("torchao")
    from open_mythos.quantization import quantize_int8

    lm = OpenMythosForCausalLM.wrap(quantize_int8(tiny_model()))
    with pytest.raises(CheckpointError, match="Int8Weight, which cannot be saved; save the model before converting"):
        lm.save_pretrained(tmp_path)


def test_a_missing_folder_or_model_name_is_refused(tmp_path):
    for name in ("someone/some-model", "parity-tinny"):
        with pytest.raises(
            OSError, match=rf"{name} is neither a folder .*parity-tiny.*could not be downloaded from the .*Hub; check"
        ):
            OpenMythosForCausalLM.from_pretrained(name)
    with pytest.raises(OSError, match=r"nowhere does not exist"):
        OpenMythosForCausalLM.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"someone/some-model.*hf download someone/some-model"):
        OpenMythos.from_pretrained("someone/some-model")
