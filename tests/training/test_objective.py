"""The loss as configured: supervised depths and tokens, starting states, extra terms, micro-batches."""

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_config, tiny_model

from open_mythos.tasks import UNSCORED, Batch
from open_mythos.training.baselines import stretched
from open_mythos.training.config import LoopConfig, LossConfig, TrainConfig
from open_mythos.training.growth import Growth
from open_mythos.training.objective import Objective, readout

N, T = 6, 9
PACKED = torch.arange(T).div(3, rounding_mode="floor").expand(N, -1) + 1  # documents of three tokens


def config(loops=None, loss=None, **changes):
    loops = {"schedule": "uniform", "minimum": 1, "maximum": 5, "gradient": "all", **(loops or {})}
    return TrainConfig(
        model=tiny_config(halting=False), loops=LoopConfig(**loops), loss=LossConfig(**(loss or {})), **changes
    )


@pytest.fixture
def model():
    return tiny_model("gqa", halting=False).train()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(1, 23, (N, T), generator=generator)
    targets[torch.rand(N, T, generator=generator) < 0.3] = UNSCORED
    return Batch(torch.randint(1, 23, (N, T), generator=generator), targets)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def outcome(model, batch, cfg, seed=0):
    objective = Objective(cfg)
    plan = objective.plan(0, N, T, generator(seed))
    return objective(model, batch, plan, n_scored(batch)), plan


def n_scored(batch):
    return int((batch.targets != UNSCORED).sum())


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_each_step_draws_a_rotary_factor_between_1_and_stretch(batch):
    cfg, model = config({"schedule": "fixed", "mean": 3.0}, stretch=2.0), tiny_model("gqa", rope_context=4).train()
    results = [outcome(model, batch, cfg, seed) for seed in range(20)]
    factors = [float(plan.rope_factor.unique()) for _, plan in results]
    assert len(set(factors)) == 20 and 1 <= min(factors) < 1.2 and 1.8 < max(factors) <= 2
    for (result, _), factor in list(zip(results, factors, strict=True))[:3]:
        logits = stretched(model, factor)(batch.ids, n_loops=3)
        expected = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=UNSCORED)
        torch.testing.assert_close(result.loss, expected)
    assert abs(float((results[0][0].loss - results[1][0].loss).detach())) > 1e-4  # equal if the factor were not used


def test_final_loss_is_cross_entropy_of_the_models_own_logits(model, batch):
    result, plan = outcome(model, batch, config())
    logits = model(batch.ids, n_loops=int(plan.n_loops[0]))
    torch.testing.assert_close(result.loss, F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()))
    assert int(result.n_right) == int((logits.argmax(-1) == batch.targets).sum())
    assert result.n_loops == int(plan.n_loops[0])


def test_losses_of_several_depths_have_the_configured_weights(model, batch):
    def losses(n_loops):
        for n in range(1, n_loops + 1):
            yield F.cross_entropy(model(batch.ids, n_loops=n).flatten(0, 1), batch.targets.flatten())

    each = list(losses(4))
    fixed = {"schedule": "fixed", "mean": 4.0}
    uniform, _ = outcome(model, batch, config(fixed, {"depth": "uniform"}))
    torch.testing.assert_close(uniform.loss, sum(each) / 4)
    geometric, _ = outcome(model, batch, config(fixed, {"depth": "geometric", "ratio": 0.5}))
    torch.testing.assert_close(geometric.loss, (each[3] * 8 + each[2] * 4 + each[1] * 2 + each[0]) / 15)
    last_two, _ = outcome(model, batch, config({**fixed, "gradient": "last", "grad_loops": 2}, {"depth": "uniform"}))
    torch.testing.assert_close(last_two.loss, (each[2] + each[3]) / 2)


@pytest.mark.parametrize("depth", ["final", "uniform", "geometric"])
def test_recomputed_loops_and_readouts_have_the_same_gradients(model, batch, depth):
    loss = {"depth": depth, "z": 1e-2}
    kept, _ = outcome(model, batch, config(loss=loss))
    expected = gradient(model, kept.loss)
    recomputed, _ = outcome(model, batch, config(loss=loss, checkpoint_loops=True))
    torch.testing.assert_close(recomputed.loss, kept.loss)
    assert recomputed.n_right == kept.n_right
    found = gradient(model, recomputed.loss)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)


def test_progressive_mixes_in_the_loss_of_a_run_with_fewer_loops(model, batch):
    loops = {"schedule": "fixed", "mean": 5.0, "gradient": "all"}
    whole, plan = outcome(model, batch, config(loops))
    mixed, _ = outcome(model, batch, config(loops, {"depth": "progressive", "progressive": 0.25}))
    short, _ = outcome(model, batch, config(loops, {"depth": "progressive", "progressive": 1.0}))
    torch.testing.assert_close(mixed.loss, 0.75 * whole.loss + 0.25 * short.loss)
    n = int(plan.short_loops[0])
    wanted = F.cross_entropy(model(batch.ids, n_loops=n).flatten(0, 1), batch.targets.flatten())
    torch.testing.assert_close(short.loss, wanted)
    plans = [Objective(config(loops)).plan(0, 2, T, generator(seed)) for seed in range(200)]
    assert all(1 <= p.short_grad[0] <= p.short_loops[0] <= 5 for p in plans)
    assert {int(p.short_loops[0] - p.short_grad[0]) for p in plans} == {0, 1, 2, 3, 4}
    small = [Objective(config(loops)).plan(0, 2, T, generator(seed), growth=Growth()) for seed in range(50)]
    assert {int(p.short_loops[0]) for p in small} == {1, 2}, "no more loops than growth allows yet"


@pytest.mark.parametrize("kind, expected", [("all", 5), ("last", 3), ("phantom", 3), ("one_step", 1)])
def test_gradient_reaches_the_configured_number_of_loops(kind, expected):
    loops = {"schedule": "fixed", "mean": 5.0, "gradient": kind, "grad_loops": 3}
    plan = Objective(config(loops)).plan(0, N, T, generator())
    assert plan.n_loops.unique().tolist() == [5] and plan.n_grad.unique().tolist() == [expected]


def test_fixed_point_and_z_terms_are_added_to_the_loss(model, batch):
    plain, plan = outcome(model, batch, config())
    steadied, _ = outcome(model, batch, config(loss={"fixed_point": 0.5, "z": 0.1}))
    e, ctx = model.encode(batch.ids)
    states = [model.first_state(e, ctx)]
    for loop in range(int(plan.n_loops[0])):
        states.append(model.recurrent.step(states[-1], e, loop, ctx))
    moved = (states[-1] - states[-2]).square().sum(-1) / states[-1].square().sum(-1)
    scored = batch.targets != UNSCORED
    change = (moved.mean(1) * scored.sum(1)).sum() / scored.sum()
    z = model.head(model.decode(states[-1], ctx)).logsumexp(-1).square()[scored].mean()
    torch.testing.assert_close(steadied.loss, plain.loss + 0.5 * change + 0.1 * z)
    torch.testing.assert_close(steadied.parts["change"], change.detach())
    still = Objective(config({"schedule": "by_steps", "maximum": 9}, {"fixed_point": 0.5}))
    parts = [
        still(model, batch, still.plan(0, N, T, generator(), 2, Growth(size=size)), n_scored(batch)).parts["change"]
        for size in (0.9, 1.0)
    ]
    assert parts[0] == 0 < parts[1], "the fixed-point term is off as long as problems grow"


@pytest.mark.parametrize("loss", [{}, {"depth": "geometric", "fixed_point": 0.3, "z": 0.01}, {"depth": "progressive"}])
def test_micro_batches_add_up_to_the_batch(model, batch, loss):
    cfg = config({"per": "sequence", "gradient": "last", "grad_loops": 2}, loss)
    objective = Objective(cfg)
    plan = objective.plan(0, N, T, generator())
    whole = gradient(model, objective(model, batch, plan, n_scored(batch)).loss)
    parts = [
        objective(model, Batch(batch.ids[rows], batch.targets[rows]), plan[rows], n_scored(batch)).loss
        for rows in (slice(0, 2), slice(2, 4), slice(4, 6))
    ]
    summed = gradient(model, sum(parts))
    assert whole.keys() == summed.keys()
    for name in whole:
        torch.testing.assert_close(whole[name], summed[name], atol=1e-5, rtol=1e-4)


def test_padding_does_not_change_the_loss(model, batch):
    cfg = config({"per": "sequence"})
    plain, plan = outcome(model, batch, cfg)
    wider = Batch(
        F.pad(batch.ids, (0, 3)), F.pad(batch.targets, (0, 3), value=UNSCORED), F.pad(torch.ones(N, T), (0, 3)).bool()
    )
    padded = Objective(cfg)(model, wider, plan, n_scored(batch))
    torch.testing.assert_close(padded.loss, plain.loss)
    torch.testing.assert_close(padded.n_right, plain.n_right)


def test_chunked_readout_has_the_same_loss_and_gradients():
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 23)
    x, targets, weights = torch.randn(50, 8, requires_grad=True), torch.randint(0, 23, (50,)), torch.rand(50)
    results = []
    for chunk in (0, 7, 50, 64):
        (cross_entropy, z, _), right = readout(head, x, targets, weights, chunk)
        grads = torch.autograd.grad(cross_entropy + 0.1 * z, [x, *head.parameters()])
        results.append((cross_entropy, z, right, *grads))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b)
    torch.testing.assert_close(results[0][0], (F.cross_entropy(head(x), targets, reduction="none") * weights).sum())


def test_chunks_bound_the_number_of_logits_in_memory(model, batch):
    sizes = []
    model.head.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[0]))
    outcome(model, batch, config(loss={"chunk": 8}))
    assert max(sizes) <= 8 and sum(sizes) == n_scored(batch)  # the head runs only where tokens are scored


@pytest.mark.parametrize("mask", [torch.arange(T) < torch.arange(4, 4 + N)[:, None], PACKED, None])
@pytest.mark.parametrize("changes", [{}, {"checkpoint_loops": True}])
def test_the_loss_never_synchronises_with_the_device(batch, mask, changes):
    """On the meta device, reading a value fails; on a GPU, it would wait for the device."""
    model = tiny_model("mla", halting=False).train().to("meta")
    cfg = config({"per": "sequence", "stale": 0.5}, {"depth": "uniform", "z": 0.1, "fixed_point": 0.1}, **changes)
    objective, drawn = Objective(cfg), generator()
    for step in range(2):
        there = Batch(batch.ids.to("meta"), batch.targets.to("meta"), mask)
        found = objective(model, there, objective.plan(step, N, T, drawn), n_scored(batch))
        found.loss.backward()
    assert all(x.is_meta for x in (found.loss, found.n_right, *found.parts.values()))


def test_stale_rows_start_from_the_states_of_the_previous_step(model, batch):
    starts = []
    step = model.recurrent.step
    model.recurrent.step = lambda h, *rest: starts.append(h) or step(h, *rest)
    objective = Objective(config({"schedule": "fixed", "mean": 1.0, "stale": 0.5}))
    first = objective.plan(0, N, T, generator(1))
    objective(model, batch, first, n_scored(batch))
    own = starts[0]
    plan = objective.plan(1, N, T, generator(5))
    rows = plan.stale
    assert 0 < rows.sum() < N
    left = torch.stack([objective.left[row] for row in range(N)])
    short = Batch(batch.ids[:, :5], batch.targets[:, :5])
    objective(model, short, plan, 10)
    torch.testing.assert_close(starts[1][rows], left[rows][:, :5])
    torch.testing.assert_close(starts[1][~rows], own[~rows][:, :5])
    objective(model, batch, plan, n_scored(batch))  # states of 5 tokens for 9: the rest start from the row's own
    torch.testing.assert_close(starts[2][:, 5:], own[:, 5:])


def test_an_objective_carries_nothing_but_states_between_steps(model, batch):
    cfg = config({"stale": 1.0})
    objective, again = Objective(cfg), Objective(cfg)
    drawn = generator()
    for step in range(2):
        objective(model, batch, objective.plan(step, N, T, drawn), n_scored(batch))
    again.left = objective.left
    plan = objective.plan(2, N, T, drawn)
    same = [o(model, batch, plan, n_scored(batch)).loss for o in (objective, again)]
    assert same[0] == same[1]
    assert Objective(config())(model, batch, plan, n_scored(batch)).loss != same[0]


@pytest.mark.parametrize("kind, n_loops", [("single", 1), ("wide", 1), ("unrolled", 5), ("plain", 5)])
def test_baselines_have_one_depth(kind, n_loops):
    plan = Objective(config({"stale": 1.0}, kind=kind)).plan(0, N, T, generator())
    assert plan.n_loops.unique().tolist() == plan.n_grad.unique().tolist() == [n_loops]
    assert not plan.stale.any()


@pytest.fixture
def solved(batch):
    """A batch with three solution steps for each token, the last of which is the target."""
    known = torch.randint(1, 23, (N, T, 2), generator=generator(8)).masked_fill(
        (batch.targets == UNSCORED)[..., None], UNSCORED
    )
    return Batch(batch.ids, batch.targets, steps=torch.cat([known, batch.targets[..., None]], 2))


def test_loop_k_is_supervised_with_the_kth_solution_step(model, solved):
    def losses(n_loops):
        for n in range(1, n_loops + 1):
            due = solved.steps[..., min(n, 3) - 1]
            yield F.cross_entropy(model(solved.ids, n_loops=n).flatten(0, 1), due.flatten())

    fixed = {"schedule": "fixed", "mean": 5.0}
    result, _ = outcome(model, solved, config(fixed, {"depth": "steps"}))
    torch.testing.assert_close(result.loss, sum(losses(5)) / 5)
    single, _ = outcome(model, solved, config(fixed, {"depth": "steps"}, kind="single"))
    answer = F.cross_entropy(model(solved.ids, n_loops=1).flatten(0, 1), solved.targets.flatten())
    torch.testing.assert_close(single.loss, answer)  # a model of one loop is supervised with the answer


def test_outcome_supervises_only_the_answer_at_the_end_of_a_run(model, solved):
    cfg = config({"schedule": "fixed", "mean": 4.0}, {"depth": "steps", "outcome": 0.25}, steps=8)
    objective = Objective(cfg)
    early, late = (objective.plan(step, N, T, generator()) for step in (5, 6))
    assert not early.outcome.any() and late.outcome.all()
    found = objective(model, solved, late, n_scored(solved)).loss
    expected = sum(
        F.cross_entropy(model(solved.ids, n_loops=n).flatten(0, 1), solved.targets.flatten()) for n in (3, 4)
    )
    chance = (solved.steps[..., :2] == solved.targets[..., None]) & (solved.targets != UNSCORED)[..., None]
    for n in (1, 2):  # a solution step that equals the answer is supervised too
        hits = chance[..., n - 1]
        if hits.any():
            logits = model(solved.ids, n_loops=n)
            expected = expected + F.cross_entropy(logits[hits], solved.targets[hits], reduction="sum") / n_scored(
                solved
            )
    torch.testing.assert_close(found, expected / 4)


def test_by_steps_runs_one_loop_per_solution_step_and_some_spare_ones():
    objective = Objective(config({"schedule": "by_steps", "maximum": 9, "spare": 2}))
    drawn = {int(objective.plan(0, N, T, generator(seed), 4).n_loops[0]) for seed in range(40)}
    assert drawn == {4, 5, 6}
    few = Growth(size=0.18)  # at most five loops
    assert {int(objective.plan(0, N, T, generator(seed), 4, few).n_loops[0]) for seed in range(40)} == {4, 5}


def test_gradient_each_trains_every_loop_with_its_own_loss_only(model, solved):
    cfg = config({"schedule": "fixed", "mean": 3.0, "gradient": "each"}, {"depth": "steps"})
    found = gradient(model, outcome(model, solved, cfg)[0].loss)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    e, ctx = model.encode(solved.ids)
    h = model.first_state(e, ctx)
    for n in range(3):
        e, ctx = model.encode(solved.ids)
        after = model.recurrent.step(h if n else model.first_state(e, ctx).detach(), e, n, ctx)
        loss = F.cross_entropy(model.head(model.decode(after, ctx)).flatten(0, 1), solved.steps[..., n].flatten()) / 3
        for name, grad in gradient(model, loss).items():
            expected[name] += grad
        h = after.detach()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n_loops", [1, 2, 3])
def test_accuracy_counts_only_tokens_known_at_the_last_loop(model, batch, n_loops):
    """Tokens are known after 0, 1 and 2 solution steps, in turn."""
    known = torch.arange(T) % 3
    steps = torch.where(torch.arange(3) < known[:, None], UNSCORED, batch.targets[..., None])
    cfg = config({"schedule": "fixed", "mean": float(n_loops)}, {"depth": "steps"})
    result, _ = outcome(model, Batch(batch.ids, batch.targets, steps=steps), cfg)
    due = batch.targets.masked_fill(known >= n_loops, UNSCORED)
    right = model(batch.ids, n_loops=n_loops).argmax(-1) == due
    assert (int(result.n_asked), int(result.n_right)) == (int((due != UNSCORED).sum()), int(right.sum()))
