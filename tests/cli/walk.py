"""All kinds of folders that commands write, made by the commands at tiny size, and what the commands print."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.color import ColorSystem
from typer.testing import CliRunner, Result

from open_mythos import evaluation
from open_mythos.cli import app
from open_mythos.cli.console import console
from open_mythos.training import fit

QUICK = ["steps=2", "batch_size=4", "evaluation.examples=2", "evaluation.difficulties=4,6"]
GATE = ["gate.steps=6", "gate.batch_size=4"]
SMALL = ["model.dim=16", "model.n_heads=2", "model.n_kv_heads=2", "loops.maximum=2", "evaluation.loops=1,2"]
TEXT = ["text", "data=texts/*.txt", "length=16", "steps=2", "batch_size=2", "evaluation.examples=2", *SMALL]
COMMANDS = {
    "demo": "mythos demo --steps 2 --out demo",
    "demo-pretrained": "mythos demo --pretrained --out 'demo pretrained'",
    "run": shlex.join(["mythos", "train", "debug", *QUICK, *GATE, "--out", "a run"]),
    "text": shlex.join(["mythos", "train", *TEXT, "--out", "text"]),
    "compare": shlex.join(
        ["mythos", "compare", "debug", *QUICK, "gate.steps=0", "loops.maximum=2", "model.max_loop_iters=2",
         "evaluation.loops=1,2", "--seeds", "0", "--out", "compare"]
    ),
    "gate": "mythos train-gate 'a run' --steps 1 --out gate",
    "exported": "mythos export 'a run' exported",
    "exported text": "mythos export text 'exported text'",
    "converted": "mythos convert reference converted",
    "retrofit": "mythos retrofit llama --prelude 1 --core 2 --coda 1 --loops 2 --out retrofit",
}  # fmt: skip
"""Keyed by what they make; a command may read the folders of those before it."""


def on_few(measure: Callable[..., Any]) -> Callable[..., Any]:
    """Restrict a measurement by depth to two problems of each difficulty and the three smallest numbers of loops."""
    return lambda *what, **options: measure(*what[:3], what[3][:3], 2, *what[5:], **options)


def mythos(line: str, *more: str, said: str = "") -> Result:
    """Run a command line as a shell would, with ``more`` arguments after it."""
    program, *words = shlex.split(line)
    assert program == "mythos", line
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "_color_system", ColorSystem.STANDARD)  # so that suggested commands are bold
        patch.setattr(fit, "evaluate", on_few(fit.evaluate))
        patch.setattr(evaluation, "depth_grid", on_few(evaluation.depth_grid))
        return CliRunner().invoke(app, [*words, *more], input=said)


def llama(directory: Path) -> None:
    """Write the files that a download of a small Llama consists of."""
    import tokenizers
    import transformers

    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(["the same weights " * 20], 300, special_tokens=["<|end|>"], show_progress=False)
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>")
    words.save_pretrained(directory)
    torch.manual_seed(0)
    shape = transformers.LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(shape).save_pretrained(directory)


def walk(reference: Path) -> dict[str, str]:
    """Make all folders in the working directory, and return what each command printed."""
    Path("texts").mkdir()
    for i in range(20):
        Path(f"texts/{i}.txt").write_text(f"the same weights, run for {i} loops, think deeper\n" * 5)
    llama(Path("llama"))
    Path("reference").symlink_to(reference)
    printed = {}
    for name, line in COMMANDS.items():
        done = mythos(line)
        assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception!r}"
        printed[name] = done.stdout
    return printed
