"""Training and evaluation with the mixture recurrence, which carries more than a state from loop to loop."""

import pytest
import torch
from tiny import tiny_run

from open_mythos import tasks
from open_mythos.evaluation.metrics import fixed_vs_halting, initial_state_gap
from open_mythos.training.config import GateConfig
from open_mythos.training.gate import train_gate
from open_mythos.training.trainer import Trainer

MIXTURE = ("model.recurrence=mixture", "model.router_score=softmax", "model.loop_index_dim=3")


def test_training_and_evaluation_work_with_a_mixture_recurrence():
    trainer = Trainer(tiny_run(*MIXTURE, "loss.fixed_point=0.1", "loss.depth=uniform", checkpoint_loops=True))
    for _ in range(3):
        result = trainer.step()
        assert not result.skipped and 0 < result.loss < 10
    task = tasks.load("parity")
    gap = initial_state_gap(trainer.model, task, 4, 3, examples=4)
    assert gap["own"].differing == 0 and gap.keys() == {"own", "zeros", "noise"}
    gain = fixed_vs_halting(trainer.model, task, [2, 4], 3, examples=4)
    assert gain.loops_fixed == 3 >= gain.loops_halting


def test_training_the_gate_of_a_mixture_separately_is_refused():
    with pytest.raises(ValueError, match=r"gate.steps=9 .*use gate.steps=0"):
        tiny_run(*MIXTURE, "gate.steps=9")
    model = Trainer(tiny_run(*MIXTURE)).model
    with pytest.raises(ValueError, match=r"recurrence='mixture' .*trained with the model"):
        train_gate(model, tasks.load("parity"), GateConfig(), 2, 4, torch.Generator())
