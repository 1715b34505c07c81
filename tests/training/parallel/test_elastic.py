"""A checkpoint of four processes, with expert parallelism, resumes on any number of processes in any layout."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch import assert_resumed, launch

LONG = bool(os.environ.get("OPEN_MYTHOS_LONG"))
STEPS, MORE = 2, 2
SAVED = ("parallel.shard=4", "parallel.expert=2")
COMMON = ("batch_size=12", "model.n_experts=12", "loops.per=sequence", "model.dense_dim=24")
MUON = (*COMMON, "optim.optimizer=muon")
# layouts by number of processes
LAYOUTS: dict[int, list[tuple[str, ...]]] = {
    4: [SAVED, ("parallel.expert=4",), ("parallel.shard=2", "parallel.tensor=2"), ("parallel.shard=4",), ()],
    1: [()],
    2: [("parallel.shard=2", "parallel.expert=2"), ("parallel.shard=2",), ("parallel.expert=2",),
        ("parallel.tensor=2",), ()],
    3: [("parallel.shard=3",), ("parallel.expert=3",), ("parallel.shard=3", "parallel.expert=3"), ()],
}  # fmt: skip


@pytest.mark.skipif(not LONG, reason="15 layouts three times; OPEN_MYTHOS_LONG=1")
@pytest.mark.parametrize(
    "settings", [COMMON, MUON, (*MUON, "model.attn_type=mla", "checkpoint_loops=true")], ids=["adamw", "muon", "mla"]
)
def test_every_layout_resumes_from_the_checkpoint_of_another(tmp_path: Path, settings: tuple[str, ...]) -> None:
    groups = [(n, [["loaded", MORE, "saved", *of, *settings] for of in given]) for n, given in LAYOUTS.items()]
    groups[0][1].insert(0, ["saved", STEPS, MORE, "saved", *SAVED, *settings])
    (expected, *of_four), *others = launch(tmp_path, groups, timeout=1500)
    results = [*of_four, *itertools.chain(*others)]
    assert len(results) == 15
    for result in results:
        assert_resumed(result, expected)


@pytest.mark.skipif(not LONG, reason="50 kills; OPEN_MYTHOS_LONG=1")
@pytest.mark.timeout(1800)
def test_after_a_kill_during_a_save_the_old_or_the_new_checkpoint_loads(tmp_path: Path) -> None:
    script = Path(__file__).with_name("torn_saves.py")
    done = subprocess.run([sys.executable, script, tmp_path, "50"], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
