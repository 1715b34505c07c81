"""Each sequence of a batch runs its own number of loops, with gradient through the last of them."""

import pytest
import torch
from helpers import tiny_model

from open_mythos.nn.schedule import Schedule

B, T = 4, 7
N_LOOPS = torch.tensor([5, 2, 1, 4])
N_GRAD = torch.tensor([2, 2, 1, 3])
ONES = torch.ones(B).long()
PADDED = torch.arange(T) < torch.tensor([[7], [4], [6], [2]])
IDS = torch.randint(1, 23, (B, T), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model():
    return tiny_model("gqa", halting=False, dropout=0.0).train()


def encoded(model, valid=None):
    e, ctx = model.encode(IDS, attention_mask=valid)
    e = e.detach().requires_grad_()
    return model.first_state(e, ctx), e, ctx


def alone(model, i, h, e, valid, n, k, damping=1.0):
    """The slow, obvious way: one sequence, (1, T, dim), in its own context."""
    h, e = h[i : i + 1], e[i : i + 1]
    _, ctx = model.encode(IDS[i : i + 1], attention_mask=None if valid is None else valid[i : i + 1])
    for loop in range(n):
        if loop == n - k:
            h = h.detach() if n > k else h
        after = model.recurrent.step(h, e, loop, ctx)
        h = after if loop < n - k else h + damping * (after - h)
    return h[0]


def weights_grad(model, e, loss):
    return torch.autograd.grad(loss, [e, *model.recurrent.block.parameters(), *model.recurrent.lora.parameters()])


@pytest.mark.parametrize("valid", [None, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("damping", [1.0, 0.5])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_batch_equals_its_sequences_run_one_by_one(model, valid, damping, recompute):
    h, e, ctx = encoded(model, valid)
    finals = [None] * B
    for stage in model.recurrent.scheduled(h, e, ctx, Schedule(N_LOOPS, N_GRAD, damping, recompute)):
        for row, after, left in zip(stage.rows.tolist(), stage.after, stage.left.tolist(), strict=True):
            if left == 0:
                finals[row] = after
    wanted = [alone(model, i, h, e, valid, int(N_LOOPS[i]), int(N_GRAD[i]), damping) for i in range(B)]
    probe = torch.randn(B, T, 32, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(torch.stack(finals), torch.stack(wanted), atol=1e-5, rtol=1e-5)
    got = weights_grad(model, e, (torch.stack(finals) * probe).sum())
    want = weights_grad(model, e, (torch.stack(wanted) * probe).sum())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)


def test_stages_are_the_loops_with_gradient_and_no_extra_loop_is_run(model):
    seen = []
    model.recurrent.block.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    stages = list(model.recurrent.scheduled(*encoded(model), Schedule(N_LOOPS, N_GRAD)))
    assert [(stage.rows.tolist(), stage.left.tolist()) for stage in stages] == [
        ([1, 2], [1, 0]), ([1, 3], [0, 2]), ([3], [1]), ([0, 3], [1, 0]), ([0], [0]),
    ]  # fmt: skip
    assert sum(seen) == int(N_LOOPS.sum())
    torch.testing.assert_close(stages[1].before[0], stages[0].after[0])


def test_recompute_saves_less_for_the_backward_pass(model):
    def saved(recompute):
        sizes, six = [], torch.full((B,), 6)

        def pack(x):
            sizes.append(x.numel())
            return x

        inputs = encoded(model)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            list(model.recurrent.scheduled(*inputs, Schedule(six, six, recompute=recompute)))
        return sum(sizes)

    assert saved(True) < saved(False) / 4


def test_around_gets_the_states_before_recomputed_loops_and_the_last_state(model):
    seen = []

    def around(h, loop):
        seen.append((loop, len(h)))
        return h

    inputs = encoded(model)
    list(model.recurrent.scheduled(*inputs, Schedule(N_LOOPS, N_GRAD, around=around)))
    assert not seen
    list(model.recurrent.scheduled(*inputs, Schedule(N_LOOPS, N_GRAD, recompute=True, around=around)))
    assert seen == [(0, 2), (1, 2), (2, 1), (3, 2), (4, 1), (0, 1)]


def after_one_loop(model, valid, state_noise):
    model.cfg.state_noise = state_noise
    with torch.no_grad():
        return list(model.recurrent.scheduled(*encoded(model, valid), Schedule(ONES, ONES)))[-1].after


def test_state_noise_is_added_at_every_loop(model):
    noisy, plain = (after_one_loop(model, None, noise) for noise in (0.5, 0.0))
    assert 0.4 < float((noisy - plain).std()) < 0.6


def test_padding_gets_no_noise(model):
    noisy, plain = (after_one_loop(model, PADDED, noise) for noise in (0.5, 0.0))
    assert torch.equal(noisy.ne(plain).any(-1), PADDED)


def test_training_records_the_largest_number_of_trained_loops(model):
    model.recurrent.lora.trained_loops.zero_()
    list(model.recurrent.scheduled(*encoded(model), Schedule(N_LOOPS, N_GRAD)))
    assert model.recurrent.lora.trained_loops == 5
