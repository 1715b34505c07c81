"""Converted checkpoints give the logits of the reference package, which made these; other files are refused."""

import json
import os
import pickle
import re
import shutil

import pytest
import torch
from helpers import tiny_model
from safetensors.torch import load_file, save_file

from open_mythos import KVCache, MythosConfig, OpenMythos
from open_mythos.checkpoint import CheckpointError
from open_mythos.integrations.upstream import convert
from open_mythos.reference import reference_logits

CASES = ("training.pt", "state_dict.pt", "safetensors", "bin")
SETTINGS = {"state_dict.pt": ["act_threshold=0.99"]}
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def expected(reference_checkpoints):
    return {name: torch.load(reference_checkpoints / f"{name}.expected") for name in CASES}


@pytest.fixture(scope="module")
def converted(reference_checkpoints, tmp_path_factory):
    """Models by case, each loaded from the folder that the converted model was saved in."""
    found = {}
    for name in CASES:
        folder = tmp_path_factory.mktemp("converted")
        convert(reference_checkpoints / name, settings=SETTINGS.get(name, ())).model.save_pretrained(folder)
        found[name] = OpenMythos.from_pretrained(folder)
    return found


@pytest.fixture(scope="module")
def tensors(reference_checkpoints):
    """The tensors of the bare state_dict, for tests to modify."""
    return torch.load(reference_checkpoints / "state_dict.pt")


# -- the same logits


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_the_reference(name, converted, expected):
    model, wanted, seen = converted[name], expected[name], []
    with torch.no_grad():
        for n_loops, logits in wanted["whole"].items():
            found = model(wanted["ids"], n_loops)
            assert (found - logits).abs().max() < TOLERANCE
            assert (reference_logits(model, wanted["ids"], n_loops) - logits).abs().max() < TOLERANCE
            seen.append(logits)
    assert seen[0].std() > 0.1 and (seen[0] - seen[1]).abs().max() > 0.1  # loops differ, so that an error would show


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("cache_type", [KVCache, dict])
def test_logits_with_a_cache_equal_those_of_the_reference(name, cache_type, converted, expected):
    model, wanted = converted[name], expected[name]
    ids = wanted["ids"]
    with torch.no_grad():
        for n_loops, logits in wanted["cached"].items():
            cache = cache_type()
            parts = [model(part, n_loops, kv_cache=cache) for part in ids.split([5, 1, 1, 1], 1)]
            assert (torch.cat(parts, 1) - logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_the_config_equals_that_of_the_reference(name, converted, expected):
    cfg, wanted = converted[name].cfg, expected[name]["cfg"]
    idle = {"n_kv_heads"} if cfg.attn_type == "mla" else {
        "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"
    }  # fmt: skip
    for field, value in wanted.items():
        assert field in idle or getattr(cfg, field) == value, field


def test_values_of_A_outside_the_range_of_this_library_are_kept(converted):
    A = converted["training.pt"].recurrent.injection.get_A()
    assert A[0] == 1.0 and 0.99 < A[1] < 1.0 and 0 < A[2] < 0.02 and A[3] == 0.0


def test_a_converted_model_trains_and_generates(converted, expected):
    model, ids = converted["bin"], expected["bin"]["ids"]
    text = model.generate(ids[:, :3], 4, n_loops=3, temperature=0)
    with torch.no_grad():
        assert text[:, 3:].equal(model(text[:, :-1], 3).argmax(-1)[:, 2:])
    before = {name: x.clone() for name, x in model.state_dict().items()}
    optimizer, losses = torch.optim.Adam(model.train().parameters(), 1e-3), []
    for _ in range(12):
        logits = model(ids[:, :-1], 3)
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    model.eval().load_state_dict(before)
    assert losses[-1].item() < 0.8 * losses[0].item()


# -- settings that are not in the file


def test_settings_that_tensors_do_not_show_are_requested(reference_checkpoints, tensors, expected, tmp_path):
    with pytest.raises(CheckpointError, match=r"does not say act_threshold.*--set act_threshold=0.99.*--config"):
        convert(reference_checkpoints / "state_dict.pt")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(expected["state_dict.pt"]["cfg"]))
    assert convert(reference_checkpoints / "state_dict.pt", path).model.cfg.act_threshold == 0.99
    bare = {name: x for name, x in tensors.items() if "freqs" not in name and "shared_experts" not in name}
    torch.save(bare, tmp_path / "bare.pt")
    with pytest.raises(CheckpointError, match="does not say act_threshold, n_experts_per_tok, rope_theta"):
        convert(tmp_path / "bare.pt")
    settings = ["act_threshold=0.9", "n_experts_per_tok=2", "rope_theta=1e4", "max_seq_len=99", "max_loop_iters=6"]
    made = convert(tmp_path / "bare.pt", settings=settings)
    cfg = made.model.cfg
    assert (cfg.n_heads, cfg.v_head_dim, cfg.n_experts_per_tok, cfg.rope_theta) == (3, 7, 2, 10000.0)
    assert (cfg.max_seq_len, cfg.max_loop_iters) == (99, 6)
    assert any("max_output_tokens=4096" in note for note in made.notes)


def test_n_heads_is_requested_without_a_rope_table(reference_checkpoints, tmp_path):
    tensors = load_file(reference_checkpoints / "safetensors" / "model.safetensors")
    save_file({name: x for name, x in tensors.items() if "freqs" not in name}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="n_heads, rope_theta"):
        convert(tmp_path, settings=["act_threshold=1", "n_experts_per_tok=1"])
    settings = ["act_threshold=1", "n_experts_per_tok=1", "n_heads=3", "rope_theta=1e4"]
    assert convert(tmp_path, settings=[*settings, "n_kv_heads=3"]).model.cfg.n_kv_heads == 3


def test_wrapped_names_shards_and_a_rope_table_cast_to_real_are_converted(reference_checkpoints, expected, tmp_path):
    tensors = load_file(reference_checkpoints / "safetensors" / "model.safetensors")
    tensors["freqs_cis"] = tensors["freqs_cis"].real.clone()  # what model.to(dtype) leaves there
    named = {f"_orig_mod.module.{name}": x for name, x in tensors.items()}
    half = len(named) // 2
    parts = {"a.safetensors": dict(list(named.items())[:half]), "b.safetensors": dict(list(named.items())[half:])}
    for name, part in parts.items():
        save_file(part, tmp_path / name)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(reference_checkpoints / "safetensors" / "config.json", tmp_path)
    made, wanted = convert(tmp_path), expected["safetensors"]
    assert any("lost its imaginary part" in note for note in made.notes)
    with torch.no_grad():
        assert (made.model(wanted["ids"], 3) - wanted["whole"][3]).abs().max() < TOLERANCE
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"b\.safetensors', which is missing; copy it too"):
        convert(tmp_path)


# -- files that are no checkpoint of the reference


class Trap:
    """Creates a folder when a pickle of it is loaded by code that executes pickles."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_no_code_in_a_file_is_run(reference_checkpoints, tensors, tmp_path):
    torch.save({"model": tensors, "cfg": Trap(tmp_path / "sprung")}, tmp_path / "trap.pt")
    with pytest.raises(CheckpointError, match=r"mkdir.*None of it was run.*vars\(c\['cfg'\]\)") as caught:
        convert(tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists() and "weights.pt" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"open_mythos.main.OpenMythos.*c.state_dict\(\)"):
        convert(reference_checkpoints / "whole_model.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(CheckpointError):
        convert(tmp_path / "old.pt")
    assert not (tmp_path / "sprung").exists()


def modified(tensors: dict, **changes) -> dict:
    return {name: x for name, x in (tensors | changes).items() if x is not None}


@pytest.mark.parametrize("changes, message", [
    ({"recurrent.gate.weight": torch.ones(2)}, r"1 tensors that version 0.5.0.*recurrent.gate.weight.*another version"),
    ({"coda.0.ffn.up.weight": torch.ones(2)}, r"coda.0.ffn.up.weight.*another version"),
    ({"prelude.1.attn.wo.weight": None}, r"lacks prelude.1.attn.wo.weight.*incomplete"),
    ({"recurrent.act.halt.weight": None}, r"lacks 1 tensors, such as recurrent.act.halt.weight"),
    ({"recurrent.act.halt.weight": torch.ones(1, 5)}, r"has shape \(1, 5\), but \(1, 48\) by its config"),
    ({"norm.weight": torch.full((48,), torch.nan)}, r"norm.weight.*not finite.*earlier checkpoint"),
    ({"head.weight": torch.ones(29, 48)}, r"separate head.weight.*cannot be converted"),
    ({"freqs_cis_mla": torch.randn(16, 3, dtype=torch.complex64)}, r"RoPE table.*cannot be converted"),
    ({"recurrent.injection.raw_A": torch.ones(48)}, "already a model of this library.*from_pretrained"),
    ({"core.recurrent.injection.raw_A": torch.ones(48)}, "already a model of this library.*from_pretrained"),
    ({"recurrent.injection.log_A": None}, r"another architecture.*embed.weight.*recurrent.injection.log_A.*retrofit"),
], ids=lambda value: value if isinstance(value, str) else "-".join(value))  # fmt: skip
def test_damaged_and_foreign_tensors_are_refused(changes, message, tensors, tmp_path):
    torch.save(modified(tensors, **changes), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "x.pt", settings=["act_threshold=0.99"])


@pytest.mark.parametrize("settings, message", [
    (["n_heads=4"], r"says n_heads=4, .*tensors of .*say 3.*leave n_heads out"),
    (["dim=64"], "says dim=64, .*say 48"),
    (["rope_theta=10000"], "says rope_theta=10000.0, .*say 500000.0"),
    (["act_threshold=5"], r"act_threshold=5 is out of range.*\(0, 1\]"),
    (["n_head=3"], "the reference has no 'n_head', did you mean 'n_heads'"),
    (["n_heads"], "write name=value, as in n_heads=8"),
    (["n_heads=many"], "'many' is not a int"),
], ids=str)  # fmt: skip
def test_conflicting_and_invalid_settings_are_refused(settings, message, reference_checkpoints):
    with pytest.raises(CheckpointError, match=message):
        convert(reference_checkpoints / "state_dict.pt", settings=["act_threshold=0.99", *settings])


def test_a_config_of_another_model_or_version_is_refused(reference_checkpoints, expected, tmp_path):
    path, cfg = tmp_path / "config.json", expected["training.pt"]["cfg"]
    source = reference_checkpoints / "training.pt"
    for text, message in [
        (json.dumps(cfg | {"n_experts": 6}), "says n_experts=6, .*say 5"),
        (json.dumps(cfg | {"disable_act": True}), r"config.json has disable_act.*0.5.0.*another version.*remove them"),
        (json.dumps([cfg]), "is a list; expected an object"),
        ("{", "not JSON"),
    ]:
        path.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            convert(source, path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert(source, tmp_path / "none.json")


def test_files_without_weights_are_refused(reference_checkpoints, tmp_path):
    whole = (reference_checkpoints / "state_dict.pt").read_bytes()
    files = {
        "cut.pt": (whole[: len(whole) // 2], "truncated, damaged, or not a file that torch.save"),
        "text.pt": (b"not weights at all, though long enough", "truncated, damaged"),
        "empty.pt": (b"", "truncated, damaged"),
        "cut.safetensors": (b"\x10\0\0\0\0\0\0\0{", "not a safetensors file.*again"),
        "lfs.bin": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*git lfs pull"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            convert(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"step": 3}, tmp_path / "step.pt")
    for source, message in [
        (tmp_path / "list.pt", "holds a list.*state_dict"),
        (tmp_path / "step.pt", "no tensors, but step"),
        (tmp_path / "nowhere.pt", "does not exist"),
        (tmp_path, r"neither model.safetensors nor pytorch_model.bin.*one of cut.pt"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            convert(source)


def test_a_model_of_this_library_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(f"{tmp_path} is already a model of this library")):
        convert(tmp_path)
    assert MythosConfig().recurrence == "injected"
