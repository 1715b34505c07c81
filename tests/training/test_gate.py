"""The gate, trained after the fact, on a model whose every position is known to be done at a certain loop."""

from __future__ import annotations

import pytest
import torch
from helpers import loops_used, tiny_model
from torch import Tensor, nn

from open_mythos import OpenMythos
from open_mythos.nn.recurrent import LoopInput
from open_mythos.tasks.base import UNSCORED, Batch, Task
from open_mythos.training.config import GateConfig
from open_mythos.training.gate import calibrate, examples, train_gate

MEASURED = {"accuracy_fixed", "accuracy_halting", "loops_fixed", "loops_halting", "saved"}
LOOPS = 8


class Echo(Task):
    """Say the token that is there; its number is what it takes :func:`echo_model` loops to do so."""

    name = "echo"
    unit = "steps"
    vocab = tuple("0123456789")
    chance = 0.1

    def length(self, difficulty: int) -> int:
        return 6

    def batch(self, n: int, difficulty: int, generator: torch.Generator | None = None) -> Batch:
        ids = torch.randint(1, difficulty + 1, (n, 6), generator=generator)
        return Batch(ids, ids)


def echo_model(early: float = -1.0) -> OpenMythos:
    """Token k's state is ``early`` times what it ends as, until loop k, and from then on what it ends as."""
    model = tiny_model(halting=False, prelude_layers=0, coda_layers=0)

    def step(h: Tensor, given: LoopInput, loop: int, *_) -> Tensor:
        k = model.head(given.e).argmax(-1, keepdim=True)
        return torch.where(loop + 1 >= k, given.e, early * given.e)

    model.recurrent.step = step
    return model


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(model: OpenMythos, gate: bool) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items() if (".act." in name) is gate}


def assert_as_long_as_it_has_to(model: OpenMythos, doubts: int = 1) -> None:
    """A gate sure to nine tenths makes sure once more."""
    ids = Echo().batch(8, 6, generator(1)).ids
    used = loops_used(model, ids, LOOPS)
    assert (used >= ids).all() and (used <= ids + doubts).all(), used - ids


def test_every_position_runs_as_long_as_it_has_to():
    model, told = echo_model(), []
    found = train_gate(model, Echo(), GateConfig(steps=120, loops=LOOPS), 2, 6, generator(), told.append)
    assert model.cfg.halting and set(found) == MEASURED and told
    assert_as_long_as_it_has_to(model)
    assert found["accuracy_fixed"] == found["accuracy_halting"] == 1
    assert found["loops_fixed"] == LOOPS and 1.5 < found["loops_halting"] < 4.5  # a draw from 1 to 2, ... or 6


@pytest.mark.parametrize("training", [False, True])
def test_nothing_but_the_gate_changes(training):
    model = tiny_model(halting=False).train(training)
    model.requires_grad_(False)  # as an average of weights is
    own, gate = weights(model, gate=False), weights(model, gate=True)
    train_gate(model, Echo(), GateConfig(steps=6, batch_size=4, loops=3), 1, 3, generator())
    assert all(torch.equal(x, own[name]) for name, x in weights(model, gate=False).items())
    assert all(not torch.equal(x, gate[name]) for name, x in weights(model, gate=True).items())
    assert model.training is training


def test_the_same_generator_gives_the_same_gate():
    gates = []
    for _ in range(2):
        model = tiny_model(halting=False)
        train_gate(model, Echo(), GateConfig(steps=6, batch_size=4, loops=3), 1, 3, generator())
        gates.append(weights(model, gate=True))
    assert all(torch.equal(x, gates[1][name]) for name, x in gates[0].items())


def test_a_gate_that_is_there_may_be_taught_again():
    model = echo_model()
    model.cfg.halting = True
    torch.nn.init.constant_(model.recurrent.act.halt.bias, 1.0)  # it halts everything at once
    train_gate(model, Echo(), GateConfig(steps=120, loops=LOOPS), 2, 6, generator())
    assert_as_long_as_it_has_to(model)


def labels(model: OpenMythos, batch: Batch, closed: bool = False) -> tuple[int, int]:
    """How many states may stop, and how many may not."""
    found = examples(model, batch, LOOPS, 0.01, generator(), closed)
    told = torch.cat([may_stop for _, _, may_stop in found])
    return int(told.sum()), int((~told).sum())


def test_a_position_may_stop_once_its_prediction_is_its_last():
    ids = torch.tensor([[1, 3, 5]])
    assert labels(echo_model(), Batch(ids, ids)) == (LOOPS + (LOOPS - 2) + (LOOPS - 4), 0 + 2 + 4)
    assert labels(echo_model(early=0.1), Batch(ids, ids)) == (3 * LOOPS, 0)  # which does not see a state's size


def test_where_nothing_is_asked_the_state_has_to_be_its_last():
    ids = torch.tensor([[1, 3, 5]])
    for early in (-1.0, 0.1):
        found = labels(echo_model(early), Batch(ids, torch.full_like(ids, UNSCORED)))
        assert found == (LOOPS + (LOOPS - 2) + (LOOPS - 4), 0 + 2 + 4)


def test_a_wrong_answer_does_not_teach_when_to_stop():
    ids, targets = torch.tensor([[1, 3, 5]]), torch.tensor([[1, 4, 5]])
    assert labels(echo_model(), Batch(ids, targets)) == (LOOPS + (LOOPS - 4), 0 + 2 + 4)


def test_padding_teaches_nothing():
    ids = torch.tensor([[1, 3, 5], [2, 0, 0]])
    batch = Batch(ids, torch.where(ids == 0, UNSCORED, ids), ids != 0)
    assert labels(echo_model(), batch) == (LOOPS + (LOOPS - 2) + (LOOPS - 4) + (LOOPS - 1), 0 + 2 + 4 + 1)


def test_a_gate_in_charge_is_taught_where_it_stopped_wrongly():
    model = echo_model()
    torch.nn.init.zeros_(model.recurrent.act.halt.weight)
    torch.nn.init.constant_(model.recurrent.act.halt.bias, 1.0)  # it halts everything after one loop
    ids = torch.tensor([[1, 3, 5]])
    alone = labels(model, Batch(ids, ids))
    assert labels(model, Batch(ids, ids), closed=True) == (alone[0] + 1, alone[1] + 2)


class Hasty(nn.Module):
    """A gate that ranks states well, small ones below large ones, and lets all of them go."""

    std = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.halt = nn.Linear(1, 1)
        nn.init.zeros_(self.halt.bias)

    def forward(self, h: Tensor) -> Tensor:
        return (self.halt.bias + torch.where(h.norm(dim=-1) > 1, 10.0, 5.0)).sigmoid()


def test_the_line_is_drawn_where_nothing_is_lost():
    model, task = echo_model(early=-0.1), Echo()
    model.cfg.halting, model.recurrent.act = True, Hasty()
    problems = task.mixed([6] * 32, generator(2))
    assert loops_used(model, problems.ids, LOOPS).eq(1).all()
    calibrate(model, task, problems, LOOPS)
    assert_as_long_as_it_has_to(model, doubts=2)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ValueError, match="steps=0 trains no gate"):
        train_gate(tiny_model(), Echo(), GateConfig(steps=0), 1, 2, generator())
    with pytest.raises(ValueError, match="min_difficulty=3 is above max_difficulty=2"):
        train_gate(tiny_model(), Echo(), GateConfig(), 3, 2, generator())
