"""`key=value` on a command line sets the field, converted to its type; errors name the dotted key."""

from __future__ import annotations

import re

import pytest

from open_mythos.training.config import TrainConfig
from open_mythos.training.overrides import differences, override


def test_values_are_converted_to_the_type_of_their_field() -> None:
    cfg = override(
        TrainConfig(),
        [
            "optim.lr=3e-4",
            "steps=2000",
            "checkpoint_loops=true",
            "model.halting=False",
            "loops.schedule=poisson",
            "evaluation.loops=1,2,4",
            "evaluation.difficulties=[8, 16]",
            "task.options.modulus=5",
            "task.options.source=hf:some/set",
            "task.options.carry=true",
            "loggers=tensorboard,wandb",
        ],
    )
    assert (cfg.optim.lr, cfg.steps, cfg.checkpoint_loops, cfg.model.halting) == (3e-4, 2000, True, False)
    assert (cfg.loops.schedule, cfg.evaluation.loops, cfg.evaluation.difficulties) == ("poisson", [1, 2, 4], [8, 16])
    assert cfg.task.options == {"modulus": 5, "source": "hf:some/set", "carry": True}
    assert cfg.loggers == "tensorboard,wandb"


def test_override_does_not_modify_the_given_config() -> None:
    cfg = TrainConfig()
    override(cfg, ["optim.lr=1", "task.options.modulus=5", "task.options={'a': 1}"])
    assert cfg == TrainConfig()


def test_fields_that_constrain_each_other_can_be_set_in_any_order() -> None:
    assert override(TrainConfig(), ["loops.minimum=30", "loops.maximum=40"]).loops.minimum == 30
    assert override(TrainConfig(), ["accumulate=3", "batch_size=9"]).accumulate == 3


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optim.lrr=1", "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        ("lr=1", "unknown key 'lr'; did you mean 'optim.lr' or 'gate.lr'?"),
        ("task.chunk=1", "did you mean 'loss.chunk'?"),
        ("optim=1", "unknown key 'optim'"),
        ("optim.lr", "'optim.lr' is not an override; write key=value"),
        ("optim.lr=-1", "optim.lr=-1 is out of range"),
        ("optim.lr=fast", "optim.lr='fast' is not a number"),
        ("steps=1.5", "steps='1.5' is not a whole number"),
        ("model.halting=yes", "model.halting='yes' is not a bool"),
        ("loops.schedule=unifrom", "loops.schedule='unifrom' is unknown; use one of"),
        ("evaluation.loops=1,two", "evaluation.loops='two' is not a whole number"),
        ("model.n_heads=3", "model.dim=2048 is not divisible by n_heads=3"),
        ("task.options=5", "task.options=5 is not a dict"),
    ],
)
def test_errors_name_the_dotted_key(assignment: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        override(TrainConfig(), [assignment])


def test_differences_are_listed_by_dotted_key() -> None:
    other = override(TrainConfig(), ["optim.lr=1", "task.options.modulus=5"])
    assert differences(TrainConfig(), other) == {"optim.lr": (1e-3, 1.0), "task.options": ({}, {"modulus": 5})}
