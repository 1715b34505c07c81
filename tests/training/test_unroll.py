"""Sequences of a batch run as many loops as each is given, with gradient through the last of them."""

import pytest
import torch
from helpers import tiny_model

from open_mythos.ops.mask import CausalMask
from open_mythos.training.unroll import unroll

B, T = 4, 7
N_LOOPS = torch.tensor([5, 2, 1, 4])
N_GRAD = torch.tensor([2, 2, 1, 3])


@pytest.fixture
def model():
    return tiny_model("gqa", halting=False, dropout=0.0).train()


def encoded(model, valid=None):
    ids = torch.randint(1, 23, (B, T), generator=torch.Generator().manual_seed(1))
    e, freqs, mask = model.encode(ids, attention_mask=valid)
    e = e.detach().requires_grad_()
    return model.first_state(e), e, freqs, mask


def alone(model, h, e, freqs, valid, n, k, damping=1.0):
    """The slow, obvious way: one sequence, (1, T, dim)."""
    for loop in range(n):
        if loop == n - k:
            h = h.detach() if n > k else h
        after = model.recurrent.step(h, e, loop, freqs, CausalMask(T, T, valid))
        h = after if loop < n - k else h + damping * (after - h)
    return h


def weights_grad(model, e, loss):
    return torch.autograd.grad(loss, [e, *model.recurrent.block.parameters()])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("damping", [1.0, 0.5])
@pytest.mark.parametrize("recompute", [False, True])
def test_equals_each_sequence_run_alone(model, padded, damping, recompute):
    valid = torch.arange(T) < torch.tensor([[7], [4], [6], [2]]) if padded else None
    h, e, freqs, mask = encoded(model, valid)
    finals = [None] * B
    for stage in unroll(model, h, e, freqs, mask, N_LOOPS, N_GRAD, damping, recompute):
        for row, after, left in zip(stage.rows.tolist(), stage.after, stage.left.tolist(), strict=True):
            if left == 0:
                finals[row] = after
    wanted = [
        alone(model, h[i : i + 1], e[i : i + 1], freqs[i : i + 1] if padded else freqs,
              None if valid is None else valid[i : i + 1], int(N_LOOPS[i]), int(N_GRAD[i]), damping)[0]
        for i in range(B)
    ]  # fmt: skip
    probe = torch.randn(B, T, 32, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(torch.stack(finals), torch.stack(wanted), atol=1e-5, rtol=1e-5)
    got = weights_grad(model, e, (torch.stack(finals) * probe).sum())
    want = weights_grad(model, e, (torch.stack(wanted) * probe).sum())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)


def test_stages_are_the_loops_with_gradient_and_no_sequence_waits_for_another(model):
    seen = []
    model.recurrent.block.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    h, e, freqs, mask = encoded(model)
    stages = list(unroll(model, h, e, freqs, mask, N_LOOPS, N_GRAD))
    assert [(stage.rows.tolist(), stage.left.tolist()) for stage in stages] == [
        ([1, 2], [1, 0]), ([1, 3], [0, 2]), ([3], [1]), ([0, 3], [1, 0]), ([0], [0]),
    ]  # fmt: skip
    assert sum(seen) == int(N_LOOPS.sum())
    torch.testing.assert_close(stages[1].before[0], stages[0].after[0])


def test_recompute_keeps_less_for_the_backward_pass(model):
    def saved(recompute):
        h, e, freqs, mask = encoded(model)
        sizes = []

        def pack(x):
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            list(unroll(model, h, e, freqs, mask, torch.full((B,), 6), torch.full((B,), 6), 1.0, recompute))
        return sum(sizes)

    assert saved(True) < saved(False) / 4


def test_state_noise_is_added_at_every_loop(model):
    model.cfg.state_noise = 0.5
    h, e, freqs, mask = encoded(model)
    with torch.no_grad():
        noisy = list(unroll(model, h, e, freqs, mask, torch.ones(B).long(), torch.ones(B).long()))[-1].after
        model.cfg.state_noise = 0.0
        plain = list(unroll(model, h, e, freqs, mask, torch.ones(B).long(), torch.ones(B).long()))[-1].after
    assert 0.4 < float((noisy - plain).std()) < 0.6


def test_padding_gets_no_noise(model):
    valid = torch.arange(T) < torch.tensor([[7], [4], [6], [2]])
    h, e, freqs, mask = encoded(model, valid)
    after = []
    for model.cfg.state_noise in (0.5, 0.0):
        with torch.no_grad():
            after.append(list(unroll(model, h, e, freqs, mask, torch.ones(B).long(), torch.ones(B).long()))[-1].after)
    moved = after[0].ne(after[1]).any(-1)
    assert torch.equal(moved, valid)
