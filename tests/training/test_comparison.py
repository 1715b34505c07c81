"""Comparisons of five kinds of models on the same data and steps, and the verdicts that follow from the results."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from open_mythos.diagnostics import flops_per_token, parameters
from open_mythos.training import compare as module
from open_mythos.training import plan as planned
from open_mythos.training import runs
from open_mythos.training.compare import KINDS, Comparison, Contender, compare
from open_mythos.training.fit import load_evaluation
from open_mythos.training.plan import Plan
from open_mythos.training.recipes import configured

TINY = [
    "steps=4", "batch_size=4", "gate.steps=0", "optim.lr=0.03", "optim.ema=0", "optim.warmup=0",
    "loops.maximum=3", "model.max_loop_iters=3",
    "evaluation.difficulties=4,6", "evaluation.loops=1,6", "evaluation.examples=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare")
    cfg = configured("debug", TINY)
    return cfg, out, compare(cfg, out, seeds=[0, 1])


def test_all_five_kinds_train_on_the_same_data_and_steps(compared):
    cfg, out, found = compared
    assert [contender.kind for contender in found.contenders] == list(KINDS)
    assert [contender.loops for contender in found.contenders] == [[1, 3, 6], [1], [1], [3], [3]]
    for kind in KINDS:
        for seed in (0, 1):
            own = runs.training_config(out / f"{kind}-seed{seed}")
            assert (own.kind, own.seed, own.steps, own.task) == (kind, seed, cfg.steps, cfg.task)
    assert json.loads((out / "compare.json").read_text()) == json.loads(json.dumps(found.to_dict()))


def test_reported_numbers_are_those_of_the_runs(compared):
    cfg, out, found = compared
    looped, single, wide, unrolled, plain = found.contenders
    grids = [load_evaluation(out / f"looped-seed{seed}").grids[0].accuracy for seed in (0, 1)]
    np.testing.assert_allclose(looped.mean, (grids[0] + grids[1]) / 2)
    np.testing.assert_array_equal(looped.worst, grids[0].minimum(grids[1]))
    assert not np.array_equal(looped.mean, looped.worst), "the seeds have to differ for this test to mean anything"
    assert looped.parameters == single.parameters == parameters(cfg.model).total < unrolled.parameters
    assert plain.parameters < unrolled.parameters < wide.parameters
    assert single.training_flops < looped.training_flops < unrolled.training_flops == plain.training_flops
    assert wide.training_flops == pytest.approx(unrolled.training_flops, rel=0.05)
    assert unrolled.flops_per_token[0] == [flops_per_token(cfg.model, 3, 2)]  # each of 4 tokens attends to 2 on average
    assert wide.flops_per_token[0][0] == pytest.approx(unrolled.flops_per_token[0][0], rel=0.03)
    assert looped.flops_per_token[1] == [flops_per_token(cfg.model, n, 3) for n in (1, 3, 6)]


def test_finished_runs_are_not_repeated_and_a_stopped_one_resumes(compared, monkeypatch):
    cfg, out, found = compared
    (out / "single-seed1" / runs.EVALUATION).unlink()
    ran, fit = [], planned.fit
    monkeypatch.setattr(planned, "fit", lambda *inputs: ran.append(inputs[1:3]) or fit(*inputs))
    again = compare(cfg, out, seeds=[0, 1])
    assert ran == [(out / "single-seed1", "auto")]
    assert again.to_dict() == found.to_dict()


def test_a_comparison_with_other_settings_than_its_folder_is_refused(compared):
    cfg, out, _ = compared
    with pytest.raises(ValueError, match=r"batch_size was 4 and is 8.*another --out"):
        compare(dataclasses.replace(cfg, batch_size=8), out, seeds=[0])
    with pytest.raises(ValueError, match="at least one"):
        compare(cfg, out, seeds=[])


def test_text_is_compared_by_bits_per_byte(tmp_path, monkeypatch):
    bits = {"looped": {1: 3.0, 3: 2.0, 6: 2.1}, "single": {1: 2.5}, "unrolled": {3: 2.103}}
    bits |= {"wide": {1: 2.2}, "plain": {3: 2.3}}
    tokens = {"looped": {"number": 4.0, "syntax": 1.0}}
    monkeypatch.setattr(planned, "fit", lambda *inputs: None)
    monkeypatch.setattr(module, "load_evaluation", lambda run: bits[run.name.partition("-")[0]])
    monkeypatch.setattr(module, "load_kinds", lambda run: tokens.get(run.name.partition("-")[0], {}))
    found = compare(configured("debug", TINY), tmp_path, seeds=[0])
    assert found.contenders[0].by_token == tokens["looped"] and found.contenders[1].by_token == {}
    assert found.measure == "bits per byte" and found.difficulties == [4]
    assert found.contenders[0].mean == found.contenders[0].worst == [[3.0, 2.0, 2.1]]
    (line,) = found.verdicts()
    assert "no real difference between looped, 6 loops 2.1000 and unrolled 2.1030." in line
    assert line.endswith("looped, 3 loops 2.0000 is ahead of unrolled 2.1030.")
    assert found.contenders[0].low < found.contenders[0].mean < found.contenders[0].high, "also with a measure above 1"
    assert found.closed[0].mean == pytest.approx(0.5 / 0.397) and found.exponent[0].mean > 1
    assert found.worth()[0].startswith(
        "4 bits: of the gap from single to unrolled, 3 loops close 126% (worst 126%); φ "
    )


def test_the_worth_of_loops_is_computed_per_seed(tmp_path, monkeypatch):
    bits = {  # seed 1 has no gap; unrolled is better than single in the mean of all
        "looped": [2.40, 1.90, 2.20], "single": [2.50, 2.00, 2.40], "unrolled": [2.00, 2.10, 2.00],
        "wide": [2.0] * 3, "plain": [2.0] * 3,
    }  # fmt: skip

    def seen(run):
        loops = (1, 3, 6) if "looped" in run.name else (1,)
        return dict.fromkeys(loops, bits[run.name.partition("-")[0]][int(run.name[-1])])

    monkeypatch.setattr(module, "load_evaluation", seen)
    monkeypatch.setattr(module, "load_kinds", lambda run: {})
    monkeypatch.setattr(Plan, "trained", lambda self, kind, seed, rate, watching: self.run(kind, seed, rate))
    found = compare(configured("debug", TINY), tmp_path, seeds=[0, 1, 2])
    assert (found.closed[0].mean, found.closed[0].worst, found.closed[0].seeds) == (
        pytest.approx(0.35),
        pytest.approx(0.2),
        2,
    )
    (line,) = found.worth()
    assert "close 35% (worst 20%, 95% interval" in line and "2 of 3 seeds have a gap); φ" in line
    bits["unrolled"] = [2.5, 2.0, 2.5]
    assert compare(configured("debug", TINY), tmp_path).worth() == [
        "4 bits: no gap: unrolled is not better than single."
    ]


def test_each_kind_is_compared_at_its_best_learning_rate(tmp_path, monkeypatch):
    best, ran = {"looped": 0.1, "single": 0.03, "wide": 0.01, "unrolled": 0.1, "plain": 0.03}, []

    def evaluation(run):
        rate = float(run.name.split("-")[1][2:]) if "-lr" in run.name else 0.03
        loops = (1, 3, 6) if "looped" in run.name else (1,)
        return dict.fromkeys(loops, 2.0 + abs(rate - best[run.name.partition("-")[0]]))

    monkeypatch.setattr(module, "load_evaluation", evaluation)
    monkeypatch.setattr(module, "load_kinds", lambda run: {})
    trained = lambda self, kind, seed, rate, watching: ran.append((kind, seed, rate)) or self.run(kind, seed, rate)  # noqa: E731
    monkeypatch.setattr(Plan, "trained", trained)
    found = compare(configured("debug", TINY), tmp_path, seeds=[5, 7], rates=[0.01, 0.03, 0.1])
    assert {one.kind: one.lr for one in found.contenders} == best
    assert {one for one in ran if one[1] == 7} == {(kind, 7, rate) for kind, rate in best.items()}
    assert {one[1:] for one in ran if one[0] == "wide"} == {(5, 0.01), (5, 0.03), (5, 0.1), (7, 0.01)}
    assert found.contenders[2].tried == {"0.01": 2.0, "0.03": pytest.approx(2.02), "0.1": pytest.approx(2.09)}
    assert len({run for run in ran}) == Plan(configured("debug", TINY), tmp_path, [5, 7], [0.01, 0.03, 0.1]).n_runs


def comparison_of(looped, single, unrolled, worst=0.0):
    """A comparison at one difficulty; ``looped`` at 4 loops, as many as the unrolled model has, and at 8."""

    def contender(kind, loops, means):
        cost = [[1.0] * len(loops)]
        return Contender(kind, loops, 1, 1.0, cost, [means], [[mean - worst for mean in means]], [means], [means])

    contenders = [contender("looped", [4, 8], looped), contender("single", [1], [single])]
    contenders.append(contender("unrolled", [4], [unrolled]))
    return Comparison("parity", "bits", "accuracy", [24], 24, 4, [0, 1], contenders)


def test_the_verdict_names_the_best_model_of_any_kind():
    (line,) = comparison_of([0.7, 0.9], 0.6, 0.8).verdicts()
    assert line == (
        "24 bits: looped, 8 loops 90.0% is ahead of unrolled 80.0%. "
        "With as many operations as the unrolled model: unrolled 80.0% is ahead of looped, 4 loops 70.0%."
    )
    assert (
        "24 bits: single 95.0% is ahead of looped, 8 loops 90.0%." in comparison_of([0.7, 0.9], 0.95, 0.8).verdicts()[0]
    )


def test_the_verdict_mentions_small_differences_and_the_worst_seed():
    assert (
        "no real difference between unrolled 90.4% and looped, 8 loops 90.0%."
        in comparison_of([0.7, 0.9], 0.5, 0.904).verdicts()[0]
    )
    assert "on average, but not in its worst seed." in comparison_of([0.7, 0.9], 0.6, 0.85, worst=0.1).verdicts()[0]


def test_entries_and_curves_have_the_means_of_all_contenders():
    found = comparison_of([0.7, 0.9], 0.6, 0.8)
    assert [entry.name for entry in found.entries()] == ["looped, 8 loops", "looped, 4 loops", "single", "unrolled"]
    assert [entry.mean for entry in found.entries()] == [[0.9], [0.7], [0.6], [0.8]]
    assert found.curves(24) == {"looped": {4: 0.7, 8: 0.9}, "single": {1: 0.6}, "unrolled": {4: 0.8}}
