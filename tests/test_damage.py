"""Random damage to every kind of file that is read: an error names the file, or no checksummed value has changed.

``DAMAGE=1000`` damages that many files, another ``DAMAGE_SEED`` damages others.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fabricated import fabricate_run
from helpers import damaged, tiny_model

from open_mythos import OpenMythos, weights
from open_mythos.generation.native import build
from open_mythos.models import card_of, tokenizer_of
from open_mythos.report.data import _baselines
from open_mythos.tasks import filling, store, tokenizer
from open_mythos.training import checkpoints, runs
from open_mythos.training.config import TrainConfig
from open_mythos.training.fit import load_evaluation
from open_mythos.training.loggers import read_metrics

N = int(os.environ.get("DAMAGE", "120"))
COMPARISON = {
    "recipe": "parity", "unit": "bits", "measure": "accuracy", "difficulties": [8], "trained_loops": 4, "seeds": [1],
    "contenders": [{"kind": "looped", "loops": [1], "mean": [[0.5]], "low": [[0.5]], "high": [[0.5]]}], "entries": [],
    "verdicts": ["so so"],
}  # fmt: skip
BLOCKS = (1, 8, 16, 512)  # sizes in bytes of swapped blocks
WRONG = [b"[]", b"{}", b"null", b'"x"', b"1e999", b"[" * 99_999, b'{"model": [], "files": 3, "weight_map": []}']


def tensors_of(model: OpenMythos) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, tuple[Callable[[], Any], bool]]:
    """For each file: a function that reads it as plain values, and whether it is editable text without a checksum."""
    here = tmp_path_factory.mktemp("whole")
    run, sharded, words = here / "run", here / "sharded", here / "words"
    fabricate_run(run)
    model = run / "model"
    (model / "README.md").write_text("---\nlicense: mit\n---\nA card.\n")
    (run / "compare.json").write_text(json.dumps(COMPARISON))
    held = {"step": 3, "weights": torch.randn(500), "part": checkpoints.Part(torch.randn(500), (500,), (0,), True)}
    checkpoint = checkpoints.save(run / "checkpoints", 3, held, keep=1)
    tiny_model().save_pretrained(sharded)
    stored = weights.read(sharded / "model.safetensors")
    (sharded / "model.safetensors").rename(sharded / "one.safetensors")
    index = {"weight_map": dict.fromkeys(stored, "one.safetensors")}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copytree(sharded, words)
    (words / "one.safetensors").rename(words / "model.safetensors")
    (words / "model.safetensors.index.json").unlink()
    tokenizer.Tokenizer(ends=True).save(words)
    (words / "tokenizer_config.json").write_text('{"eos_token": {"content": "<eos>"}}')
    text = here / "texts"
    text.mkdir()
    for i in range(20):
        (text / f"{i}.txt").write_text(f"the same weights, {i} loops\n" * 9)
    cached = here / "cached"
    filling.fill(cached, [f"{text}/*.txt"], "bytes", 1 << 20)

    def corpus() -> Any:
        return {name: list(tokens) for name, tokens in store.opened(cached).tokens.items()}

    def state() -> Any:
        found = checkpoints.load(checkpoint)
        return found["step"], found["weights"].tolist(), found["part"][()].tolist()

    return {
        model / "model.safetensors": (lambda: tensors_of(OpenMythos.from_pretrained(model)), False),
        sharded / "one.safetensors": (lambda: tensors_of(OpenMythos.from_pretrained(sharded)), False),
        sharded / "model.safetensors.index.json": (lambda: tensors_of(OpenMythos.from_pretrained(sharded)), False),
        model / "config.json": (lambda: OpenMythos.from_pretrained(model).cfg.to_dict(), True),
        model / "training.json": (lambda: TrainConfig.load(model / "training.json").to_dict(), True),
        model / "README.md": (lambda: card_of(run), True),
        words / "tokenizer.json": (lambda: tokenizer_of(words).pieces, True),
        words / "tokenizer_config.json": (lambda: tokenizer_of(words).pieces, True),
        checkpoint / "state.pt": (state, False),
        checkpoint / "pieces_00000.safetensors": (state, False),
        checkpoint / "manifest.json": (state, False),
        run / "config.json": (lambda: TrainConfig.load(run / runs.RUN_CONFIG).to_dict(), True),
        run / "metrics.jsonl": (lambda: read_metrics(run / runs.METRICS), True),
        run / "evaluation.json": (lambda: load_evaluation(run).to_dict(), True),  # type: ignore[union-attr]
        run / "compare.json": (lambda: _baselines(run), True),
        cached / "train-00000.bin": (corpus, False),
        cached / "held_out-00000.bin": (corpus, False),
        cached / store.INDEX: (corpus, False),
        cached / "tokenizer.json": (corpus, False),
    }


def test_damaged_files_are_refused_or_read_unchanged(kinds: dict[Path, tuple[Callable[[], Any], bool]]) -> None:
    draw, wrong, counts = (
        random.Random(int(os.environ.get("DAMAGE_SEED", "0"))),
        [],
        {"refused": 0, "equal": 0, "other": 0},
    )
    wholes = {path: (path.read_bytes(), read()) for path, (read, _) in kinds.items()}
    for i in range(N):
        path = list(kinds)[i % len(kinds)]
        (read, may_be_edited), (content, value) = kinds[path], wholes[path]
        also = (lambda new: draw.choice(WRONG)) if path.suffix in (".json", ".jsonl", ".md") else None
        path.write_bytes(damaged(content, draw, BLOCKS, also))
        try:
            found = read()
        except (ValueError, OSError) as error:
            counts["refused"] += 1
            # a damaged corpus is rebuilt, so its error need not name the file
            if path.name not in str(error) and "cached" not in str(path):
                wrong.append(f"{path.name}: not named in {error!s:.200}")
        except Exception as error:
            wrong.append(f"{path.name}: {type(error).__name__} {error!s:.200}")
        else:
            is_equal = repr(found) == repr(value)
            counts["equal" if is_equal else "other"] += 1
            if not is_equal and not may_be_edited:
                wrong.append(f"{path.name}: other values, without an error")
        path.write_bytes(content)
    print(f"{N} damaged files of {len(kinds)} kinds: {counts}, {len(wrong)} wrong")
    assert not wrong, "\n".join(wrong)


def test_a_damaged_compiled_decoder_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "decode.c"
    source.write_text("int answer(void) { return 42; }\n")
    monkeypatch.setattr(build, "SOURCE", source)
    words, draw = build.compiler(), random.Random(0)
    if words is None:
        pytest.skip("no C compiler")
    made = build._compiled(words, tmp_path)
    assert isinstance(made, Path)
    whole = made.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"\x7fELF foreign", damaged(whole, draw, BLOCKS)):
        made.write_bytes(content)
        again = build._compiled(words, tmp_path)
        assert isinstance(again, Path) and again.read_bytes() == whole
    assert ctypes.CDLL(str(again)).answer() == 42
