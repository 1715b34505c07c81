"""Limits for readability: files that a token passes through, files that query PyTorch's state, lines of a file."""

import ast
import re
import sys
from pathlib import Path

import pytest
import torch
from helpers import ATTENTION

import open_mythos
from open_mythos import MythosConfig, OpenMythos
from open_mythos.training.recipes import configured
from open_mythos.training.trainer import Trainer

PACKAGE = Path(open_mythos.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
STATE = r"is_grad_enabled|is_compiling|is_autocast_enabled|_current_graph_task_id|detect_fake_mode"
KNOWN = {"generate", "stream", "forward"}  # whose keywords are public API


class Steps:
    """Records which files of the package run, and how often a call goes from one file to another."""

    def __enter__(self):
        self.files, self.count, self.last = set(), 0, None
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *error):
        sys.setprofile(None)

    def _profile(self, frame, event, argument):
        file = frame.f_code.co_filename
        if not file.startswith(str(PACKAGE)) or event not in ("call", "return"):
            return
        if event == "call":
            self.files.add(file)
            self.count += file != self.last
            self.last = file
            return
        while (frame := frame.f_back) is not None and not frame.f_code.co_filename.startswith(str(PACKAGE)):
            pass
        self.last = self.last if frame is None else frame.f_code.co_filename


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_decoding_a_token_runs_through_few_files(attn_type):
    cfg = MythosConfig(
        vocab_size=64, dim=32, n_heads=4, n_kv_heads=2, max_seq_len=64, max_loop_iters=4, prelude_layers=1,
        coda_layers=1, attn_type=attn_type, kv_lora_rank=12, q_lora_rank=20, qk_rope_head_dim=6, qk_nope_head_dim=10,
        v_head_dim=14, n_experts=4, n_shared_experts=1, n_experts_per_tok=2, expert_dim=12, lora_rank=3, halting=False,
    )  # fmt: skip
    tokens = OpenMythos(cfg).eval().stream(torch.zeros(1, 8, dtype=torch.int64), 8, 1, temperature=0, engine="modules")
    next(tokens), next(tokens)
    with Steps() as steps:
        next(tokens)
    assert len(steps.files) <= 16 and steps.count <= 60, (sorted(steps.files), steps.count)


def test_a_training_step_runs_through_few_files():
    trainer = Trainer(configured("debug", ["loops.schedule=fixed", "loops.mean=1"]))
    trainer.step(), trainer.step()
    with Steps() as steps:
        trainer.step()
    assert len(steps.files) <= 24 and steps.count <= 100, (sorted(steps.files), steps.count)


def test_only_one_file_queries_the_state_of_pytorch():
    readers = [path.relative_to(PACKAGE).as_posix() for path in SOURCES if re.search(STATE, path.read_text())]
    assert readers == ["ops/dispatch.py"]


def test_source_files_have_at_most_400_lines():
    for path in [*SOURCES, *PACKAGE.rglob("*.[ch]")]:
        assert len(path.read_text().splitlines()) <= 400, path


def test_few_functions_have_more_than_8_parameters():
    wide = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and node.name not in KNOWN:
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                if len([name for name in names if name not in ("self", "cls")]) > 8:
                    wide.append(node.name)
    assert len(wide) <= 5, wide
