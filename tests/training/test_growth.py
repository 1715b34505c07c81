"""Problems that grow once the present ones are solved."""

from __future__ import annotations

from tiny import tiny_run

from open_mythos import tasks
from open_mythos.training.config import LoopConfig, TaskConfig
from open_mythos.training.growth import Growth
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
    grown = {size: (*Growth(size).of(task, cfg), Growth(size).most_loops(loops)) for size in (0.0, 0.2, 0.5, 1.0)}
    found = {size: (small.sentences, hardest, n) for size, (small, hardest, n) in grown.items()}
    assert found == {0.0: (8, 4, 2), 0.2: (12, 6, 5), 0.5: (20, 6, 8), 1.0: (32, 6, 8)}
    later = LoopConfig("by_steps", maximum=8, grown=0.8)
    assert [Growth(size).most_loops(later) for size in (0.0, 0.2, 0.5, 0.8)] == [2, 3, 5, 8]


def test_a_trainer_starts_small_and_goes_on_at_the_size_that_was_reached():
    cfg = tiny_run("task.growth=0.9", "loops.minimum=3", "loops.maximum=5")
    trainer = Trainer(cfg)
    assert trainer.step().loops == 2 and trainer.gauges()["size"] == 0
    trainer.growths["parity"] = Growth(size=1.0, right=0.95, steps=3)
    again = Trainer(cfg)
    again.load_state_dict(trainer.state_dict())
    assert again.growths == trainer.growths and again.step().loops >= 3
    older = trainer.state_dict() | {"growth": vars(trainer.growths["parity"])}  # of one task, with no name
    again.load_state_dict(older)
    assert again.growths == trainer.growths


def test_each_of_several_tasks_grows_by_itself():
    """One that is slow to learn neither holds up the others nor is overtaken by them."""
    weights = {"assignments": 1, "registers": 1}
    trainer = Trainer(configured("words", [f"task.options.weights={weights}", "batch_size=4"]))
    trainer.growths["registers"] = Growth(size=1.0, right=1.0, steps=20)
    drawn = set()
    for _ in range(12):
        trainer.draw()
        drawn |= {(name, each.size) for name, each in trainer.growths.items() if each is trainer.growth}
    assert drawn == {("assignments", 0.0), ("registers", 1.0)} and trainer.gauges()["size"] == 0


def test_without_growth_all_loops_are_run_from_the_start():
    trainer = Trainer(tiny_run("loops.minimum=3", "loops.maximum=5"))
    assert trainer.step().loops >= 3 and trainer.gauges()["size"] == 1
