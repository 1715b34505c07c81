"""Training the gate after the model, where it is known at which loop each position of the model converges."""

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
    """Predict the input token; for token k, :func:`echo_model` needs k loops."""

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
    """The state of token k is ``early`` times its final state until loop k, and from then on the final state."""
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


def assert_halts_when_converged(model: OpenMythos, n_extra: int = 1) -> None:
    """Within ``n_extra`` loops, since a gate that is 90% sure runs one more loop."""
    ids = Echo().batch(8, 6, generator(1)).ids
    used = loops_used(model, ids, LOOPS)
    assert (used >= ids).all() and (used <= ids + n_extra).all(), used - ids


def test_a_trained_gate_halts_each_position_when_it_has_converged():
    model, messages = echo_model(), []
    found = train_gate(model, Echo(), GateConfig(steps=120, loops=LOOPS), 2, 6, generator(), messages.append)
    assert model.cfg.halting and set(found) == MEASURED and messages
    assert_halts_when_converged(model)
    assert found["accuracy_fixed"] == found["accuracy_halting"] == 1
    assert found["loops_fixed"] == LOOPS and 1.5 < found["loops_halting"] < 4.5  # drawn from 1 to 2, ..., or 1 to 6


@pytest.mark.parametrize("training", [False, True])
def test_train_gate_changes_nothing_but_the_gate(training):
    model = tiny_model(halting=False).train(training)
    model.requires_grad_(False)  # as averaged weights are
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


def test_an_existing_gate_can_be_trained_again():
    model = echo_model()
    model.cfg.halting = True
    torch.nn.init.constant_(model.recurrent.act.halt.bias, 1.0)  # it halts everything at once
    train_gate(model, Echo(), GateConfig(steps=120, loops=LOOPS), 2, 6, generator())
    assert_halts_when_converged(model)


def labels(model: OpenMythos, batch: Batch, closed: bool = False) -> tuple[int, int]:
    """The number of states labelled as may stop, and the number labelled as may not."""
    found = examples(model, batch, LOOPS, 0.01, generator(), closed)
    label = torch.cat([may_stop for _, _, may_stop in found])
    return int(label.sum()), int((~label).sum())


def test_a_position_may_stop_once_its_prediction_is_final():
    ids = torch.tensor([[1, 3, 5]])
    assert labels(echo_model(), Batch(ids, ids)) == (LOOPS + (LOOPS - 2) + (LOOPS - 4), 0 + 2 + 4)
    assert labels(echo_model(early=0.1), Batch(ids, ids)) == (3 * LOOPS, 0)  # the size of a state does not matter


def test_an_unscored_position_may_stop_once_its_state_is_final():
    ids = torch.tensor([[1, 3, 5]])
    for early in (-1.0, 0.1):
        found = labels(echo_model(early), Batch(ids, torch.full_like(ids, UNSCORED)))
        assert found == (LOOPS + (LOOPS - 2) + (LOOPS - 4), 0 + 2 + 4)


def test_a_position_with_a_wrong_final_answer_is_no_example_of_stopping():
    ids, targets = torch.tensor([[1, 3, 5]]), torch.tensor([[1, 4, 5]])
    assert labels(echo_model(), Batch(ids, targets)) == (LOOPS + (LOOPS - 4), 0 + 2 + 4)


def test_padding_gives_no_examples():
    ids = torch.tensor([[1, 3, 5], [2, 0, 0]])
    batch = Batch(ids, torch.where(ids == 0, UNSCORED, ids), ids != 0)
    assert labels(echo_model(), batch) == (LOOPS + (LOOPS - 2) + (LOOPS - 4) + (LOOPS - 1), 0 + 2 + 4 + 1)


def test_closed_loop_adds_examples_where_the_gate_stopped_wrongly():
    model = echo_model()
    torch.nn.init.zeros_(model.recurrent.act.halt.weight)
    torch.nn.init.constant_(model.recurrent.act.halt.bias, 1.0)  # it halts everything after one loop
    ids = torch.tensor([[1, 3, 5]])
    alone = labels(model, Batch(ids, ids))
    assert labels(model, Batch(ids, ids), closed=True) == (alone[0] + 1, alone[1] + 2)


class Hasty(nn.Module):
    """A gate that ranks states correctly, small ones below large ones, but halts all of them."""

    std = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.halt = nn.Linear(1, 1)
        nn.init.zeros_(self.halt.bias)

    def forward(self, h: Tensor) -> Tensor:
        return (self.halt.bias + torch.where(h.norm(dim=-1) > 1, 10.0, 5.0)).sigmoid()


def test_calibration_corrects_a_gate_that_halts_too_early():
    model, task = echo_model(early=-0.1), Echo()
    model.cfg.halting, model.recurrent.act = True, Hasty()
    problems = task.mixed([6] * 32, generator(2))
    assert loops_used(model, problems.ids, LOOPS).eq(1).all()
    calibrate(model, task, problems, LOOPS)
    assert_halts_when_converged(model, n_extra=2)


def test_train_gate_refuses_zero_steps_and_an_empty_difficulty_range():
    with pytest.raises(ValueError, match="steps=0 trains no gate"):
        train_gate(tiny_model(), Echo(), GateConfig(steps=0), 1, 2, generator())
    with pytest.raises(ValueError, match="min_difficulty=3 is above max_difficulty=2"):
        train_gate(tiny_model(), Echo(), GateConfig(), 3, 2, generator())
