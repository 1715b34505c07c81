"""A model folder that contains its code loads where this package is not installed."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from wrapped import prompts, wrapped

from open_mythos.integrations.hf import OpenMythosConfig, OpenMythosForCausalLM

IDS = prompts(2, 8)
ELSEWHERE = """
import sys
sys.modules["open_mythos"] = None  # as if it were not installed
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder, out, again = sys.argv[1:]
ids = load_file(out)["ids"]
lm = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, num_loops=6)
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).num_loops == 4
lm.save_pretrained(again)
lm = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
AutoModel.from_pretrained(again, trust_remote_code=True)(ids)
options = dict(do_sample=False, max_new_tokens=4, attention_mask=ids.ne(0).long(), pad_token_id=0)
save_file({"ids": ids, "logits": lm(ids).logits.detach(), "text": lm.generate(ids, **options)}, out)
assert not [name for name, module in sys.modules.items() if name.startswith("open_mythos") and module]
"""


@pytest.fixture
def unregistered(monkeypatch):
    """No class is registered, whatever was registered in this process before."""
    monkeypatch.setattr(OpenMythosConfig, "_auto_class", None)
    monkeypatch.setattr(OpenMythosForCausalLM, "_auto_class", None)


@pytest.fixture
def registered(unregistered):
    OpenMythosConfig.register_for_auto_class()
    OpenMythosForCausalLM.register_for_auto_class("AutoModelForCausalLM")


def test_a_folder_with_its_code_loads_without_the_package(tmp_path, registered):
    lm, out = wrapped("mla", halting=False), tmp_path / "out.safetensors"
    lm.save_pretrained(tmp_path / "model")
    save_file({"ids": IDS}, out)
    keep = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env = {**keep, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", ELSEWHERE, tmp_path / "model", out, tmp_path / "again"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = load_file(out)
    torch.testing.assert_close(found["logits"], lm(IDS, num_loops=6).logits.detach())
    assert torch.equal(found["text"][:, :8], IDS) and found["text"].shape == (2, 12)


def test_without_registration_no_code_is_written(tmp_path, unregistered):
    wrapped().save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
