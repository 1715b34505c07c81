"""Rates are FLOPs and bytes per second, and the whole workload is timed."""

import pytest
import torch
from helpers import tiny_model

from open_mythos.diagnostics import flops_of_prompt, flops_per_trained_token, machine, speed
from open_mythos.generation import engines
from open_mythos.generation.engine import ModuleEngine

CPU = torch.device("cpu")


def test_repeat_discards_a_warmup_run():
    done = []
    times = machine.repeat(lambda: done.append(0), CPU, seconds=0)
    assert len(done) == 4 and len(times) == 3
    assert len(machine.repeat(lambda: None, CPU, seconds=0.05)) > 3


def test_machine_rates_use_the_shortest_time(monkeypatch):
    monkeypatch.setattr(machine, "repeat", lambda *_: [4.0, 2.0, 3.0])
    monkeypatch.setattr(machine, "MATMULS", ((2, 3, 5), (4, 4, 4), (9, 9, 9)))
    assert machine.matmul_rate(torch.float32, CPU) == 2 * 4 * 4 * 4 / 2  # the last shape is not used on a CPU
    monkeypatch.setattr(machine, "_READ_BYTES", {"cpu": 64})
    assert machine.read_rate(CPU) == 32
    assert machine.copy_rate(CPU) == 64  # read and written


def test_describe_names_machine_threads_and_torch():
    found = machine.describe(CPU)
    assert found["name"] and found["threads"] == torch.get_num_threads() and found["torch"] == torch.__version__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_train_speed_updates_weights_and_counts_flops(dtype):
    model = tiny_model(halting=False)
    before = model.embed.weight.detach().clone()
    found = speed.train_speed(model, 2, 8, 3, dtype, seconds=0)
    assert not torch.equal(before, model.embed.weight)
    assert found.flops == 16 * flops_per_trained_token(model.cfg, 3, 8)
    assert found.tokens_per_second == 16 / sorted(found.seconds)[1] and found.bytes_per_second is None


def test_prefill_and_decode_speed_time_the_prompt_and_new_tokens(monkeypatch):
    model, seen = tiny_model(halting=False), []
    monkeypatch.setattr(speed, "NEW", 4)
    for name in ("extend", "step"):
        plain = getattr(ModuleEngine, name)

        def watched(engine, ids, *rest, plain=plain):
            seen.append((ids.shape[1], engine.cache.length))
            return plain(engine, ids, *rest)

        monkeypatch.setattr(ModuleEngine, name, watched)
    read = speed.prefill_speed(model, 2, 8, 3, seconds=0)
    assert seen == [(8, 0)] * 4
    assert read.flops == 2 * flops_of_prompt(model.cfg, 3, 8)
    seen.clear()
    made, asked = engines.make_engine, []
    monkeypatch.setattr(speed, "make_engine", lambda name, *rest: asked.append(name) or made("modules", *rest))
    decoded = speed.decode_speed(model, 2, 8, 3, seconds=0)
    assert asked == ["auto"] and seen == [(8, 0)] + [(1, 8 + i) for i in range(4)] * 4
    assert decoded.per_repetition == 8 and decoded.bytes_per_second > 0
