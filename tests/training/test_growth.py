"""Problems that grow once those of the present size are solved."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_run

from open_mythos import tasks
from open_mythos.training.config import LoopConfig, TaskConfig
from open_mythos.training.growth import Growth
from open_mythos.training.objective import draw_loops
from open_mythos.training.recipes import configured
from open_mythos.training.trainer import Trainer


def test_problems_grow_when_most_answers_are_right_and_stay_when_not():
    growth = Growth(size=0.0)
    for _ in range(300):
        growth.add(0.8, enough=0.9)
    assert growth.size == 0
    sizes = []
    for _ in range(600):
        growth.add(1.0, enough=0.9)
        sizes.append(growth.size)
    assert sizes == sorted(sizes) and sizes[-1] == 1.0 and len(set(sizes)) > 20


def test_the_smallest_problems_have_the_fewest_sentences_and_two_loops():
    task, cfg = tasks.load("assignments", sentences=32, min_sentences=8), TaskConfig("assignments", {}, 1, 6)
    loops = LoopConfig("by_steps", maximum=8)
    grown = {size: (*Growth(size).of(task, cfg), Growth(size).loops(loops).maximum) for size in (0.0, 0.2, 0.5, 1.0)}
    found = {size: (small.sentences, hardest, n) for size, (small, hardest, n) in grown.items()}
    assert found == {0.0: (8, 4, 2), 0.2: (12, 6, 5), 0.5: (20, 6, 8), 1.0: (32, 6, 8)}
    later = LoopConfig("by_steps", maximum=8, grown=0.8)
    assert [Growth(size).loops(later).maximum for size in (0.0, 0.2, 0.5, 0.8)] == [2, 3, 5, 8]


def test_growth_is_refused_for_text():
    with pytest.raises(
        ValueError, match=r"task\.growth=0\.5 depends on the share of correct answers, which text does not have"
    ):
        configured("text", ["task.growth=0.5"])


def test_spare_loops_are_few_until_problems_have_their_full_size():
    cfg = LoopConfig("by_steps", maximum=13, spare=6)
    small, grown = Growth(0.9).loops(cfg), Growth(1.0).loops(cfg)
    assert (small.spare, small.maximum, grown) == (2, 9, cfg)
    for loops, most in ((small, 9), (grown, 13)):
        drawn = {int(draw_loops(loops, 0.5, 1, 9, torch.Generator().manual_seed(i), 7)) for i in range(99)}
        assert drawn == set(range(7, most + 1))


def test_a_trainer_starts_small_and_resumes_at_the_size_it_has_reached():
    cfg = tiny_run("task.growth=0.9", "loops.minimum=3", "loops.maximum=5")
    trainer = Trainer(cfg)
    assert trainer.step().loops == 2 and trainer.gauges()["size"] == 0
    trainer.growths["parity"] = Growth(size=1.0, right=0.95, steps=3)
    again = Trainer(cfg)
    again.load_state_dict(trainer.state_dict())
    assert again.growths == trainer.growths and again.step().loops >= 3
    older = trainer.state_dict() | {"growth": vars(trainer.growths["parity"])}  # one task, without its name
    again.load_state_dict(older)
    assert again.growths == trainer.growths


def test_tasks_grow_independently_and_all_are_in_every_step():
    """A task that is slow to learn neither holds up the others nor grows with them."""
    weights = {"assignments": 3, "registers": 1}
    trainer = Trainer(configured("words", [f"task.options.weights={weights}", "batch_size=4"]))
    trainer.growths["registers"] = Growth(size=1.0, right=1.0, steps=20)
    for _ in range(3):
        drawn = trainer.draw()
        assert [each.weight for each in drawn] == [0.75, 0.25] and {len(each.batch.ids) for each in drawn} == {4}
        assert [each.growth for each in drawn] == [trainer.growths[name] for name in weights]
    result = trainer.step()
    sizes = {name: size for name, size in trainer.gauges().items() if name.startswith("size")}
    assert sizes == {"size": 0.0, "size_assignments": 0.0, "size_registers": 1.0}
    assert trainer.growths["assignments"].steps == 1
    _, of_registers = result.by_task
    assert trainer.growths["registers"].right == pytest.approx(0.95 + 0.05 * of_registers)


def test_a_mastered_task_is_trained_every_third_step_until_all_are():
    weights = {"assignments": 3, "registers": 1}
    trainer = Trainer(configured("words", [f"task.options.weights={weights}", "batch_size=2"]))
    mastered, other = Growth(size=1.0, right=0.99), Growth(size=0.96, right=0.99)
    trainer.growths = {"assignments": mastered, "registers": other}
    drawn = []
    for trainer.step_number in range(4):
        drawn.append([(each.growth, each.weight) for each in trainer.draw()])
    assert drawn[0] == drawn[3] == [(mastered, 0.75), (other, 0.25)] and drawn[1] == drawn[2] == [(other, 1.0)]
    trainer.step_number = 4
    result = trainer.step()
    assert len(result.by_task) == 1 and mastered.steps == 0 and other.steps == 1
    mastered.right = 0.5  # its accuracy has dropped
    assert len(trainer.draw()) == 2
    mastered.right, other.size = 0.99, 1.0  # both are mastered
    assert len(trainer.draw()) == 2


def test_loss_and_gradients_of_two_tasks_are_their_weighted_mean():
    losses, gradients, alone = [], [], []
    for weights in ({"relations": 1}, {"registers": 1}, {"relations": 3, "registers": 1}):
        trainer = Trainer(configured("words", [
            f"task.options.weights={weights}", "batch_size=2", "optim.clip=1e9", "task.growth=0", "loops.minimum=3",
            "loops.maximum=3", "task.max_difficulty=2",
        ]))  # fmt: skip
        drawn = trainer.draw()
        if len(weights) == 2:
            drawn = [each._replace(batch=old.batch) for each, old in zip(drawn, alone, strict=True)]
        alone += drawn
        losses.append(trainer.forward_backward(drawn).loss)
        gradients.append({name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None})
    assert losses[2] == pytest.approx(0.75 * losses[0] + 0.25 * losses[1])
    for name, found in gradients[2].items():
        torch.testing.assert_close(found, 0.75 * gradients[0][name] + 0.25 * gradients[1][name], atol=1e-6, rtol=1e-4)


def test_without_growth_all_loops_are_run_from_the_start():
    trainer = Trainer(tiny_run("loops.minimum=3", "loops.maximum=5"))
    assert trainer.step().loops >= 3 and trainer.gauges()["size"] == 1


def test_min_difficulty_may_be_above_the_smallest_problems():
    trainer = Trainer(configured("word_problems", ["task.min_difficulty=3", "batch_size=2", "model.dim=16"]))
    assert trainer.draw()[0].batch.ids.shape[0] == 2


def test_dropout_begins_when_problems_have_their_full_size():
    trainer = Trainer(tiny_run("task.growth=0.9", "model.dropout=0.25"))
    drops = {module for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)}
    for size, p in ((0.5, 0.0), (1.0, 0.25)):
        trainer.growths["parity"].size = size
        trainer.step()
        assert drops and {module.p for module in drops} == {p}
    always = Trainer(tiny_run("model.dropout=0.25"))
    always.step()
    assert {module.p for module in always.model.modules() if isinstance(module, torch.nn.Dropout)} == {0.25}
