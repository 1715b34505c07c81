"""Sparse experts: results equal a double loop, and loads are balanced once per optimizer step."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from helpers import assert_near, left_padding, tiny_config, tiny_model, tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from open_mythos import OpenMythos
from open_mythos.nn.auxiliary import balance
from open_mythos.nn.feed_forward import MoEFFN
from open_mythos.ops.reference import moe_loop

RATE = 0.01


def experts(seed: int = 0, **changes) -> MoEFFN:
    torch.manual_seed(seed)
    return MoEFFN(tiny_config(router_bias_rate=RATE, **changes)).train()


def plain(ffn: MoEFFN, x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    logits = flat @ ffn.router.weight.T * ffn.router.scale
    chosen = (logits + ffn.router_bias).topk(ffn.topk).indices
    scores = logits.gather(1, chosen).sigmoid()
    weights = scores / scores.sum(1, keepdim=True) if ffn.topk > 1 else scores
    out = moe_loop(flat, ffn.gate_up * ffn.gate_up_scale, ffn.down * ffn.down_scale, chosen, weights)
    return (out if ffn.shared is None else out + ffn.shared(flat)).view(x.shape)


def load_of(ffn: MoEFFN, x: Tensor) -> Tensor:
    """How many tokens each expert gets, counted one by one."""
    load = torch.zeros(len(ffn.router_bias))
    for expert in ffn.route(x)[0].flatten().tolist():
        load[expert] += 1
    return load


def moved(bias: Tensor, load: Tensor) -> Tensor:
    """The bias after one update."""
    return bias + RATE * torch.sign(load.mean() - load)


# -- outputs


@given(
    n_experts=st.integers(1, 7), topk=st.integers(1, 7), width=st.integers(1, 9), dim=st.integers(1, 20),
    shared=st.integers(0, 2), n_tokens=st.integers(1, 9), skew=st.sampled_from([0.0, 50.0]),
)  # fmt: skip
def test_outputs_and_gradients_equal_a_double_loop(n_experts, topk, width, dim, shared, n_tokens, skew):
    ffn = experts(attn_type="mla", n_heads=1, n_kv_heads=1, n_experts=n_experts, n_experts_per_tok=min(topk, n_experts),
                  expert_dim=width, dim=dim, n_shared_experts=shared)  # fmt: skip
    ffn.router_bias.copy_(skew * torch.randn(n_experts))  # with skew, some experts get no tokens
    x = torch.randn(1, n_tokens, dim, requires_grad=True)
    out, expected = ffn(x), plain(ffn, x)
    assert_near(out, expected)
    inputs = dict(x=x, **dict(ffn.named_parameters()))
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * cotangent).sum(), list(inputs.values()))
    actual = torch.autograd.grad((out * cotangent).sum(), list(inputs.values()))
    for name, got, want in zip(inputs, actual, wanted, strict=True):
        assert_near(got, want, 5e-5, name)


@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 3, 32), (2, 2, 2, 32)])
def test_inputs_may_have_any_number_of_axes(shape):
    ffn, x = experts(), torch.randn(shape)
    assert_near(ffn(x), plain(ffn, x))


def test_inputs_may_be_strided():
    ffn, x = experts(), torch.randn(5, 3, 32).transpose(0, 1)
    assert_near(ffn(x), plain(ffn, x))


def test_shared_experts_run_for_every_token():
    ffn, x = experts(n_shared_experts=2), torch.randn(6, 32)
    routed = ffn(x) - ffn.shared(x)
    ffn.shared = None
    assert_near(routed, ffn(x))


# -- routing


@given(st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4))
def test_the_router_bias_changes_the_choice_but_not_the_weights(bias):
    ffn, x = experts(), torch.randn(20, 32)
    ffn.router_bias.copy_(torch.tensor(bias))
    logits = ffn.router(x)
    chosen, weights = ffn.route(x)
    assert torch.equal(chosen, (logits + torch.tensor(bias)).topk(2).indices)
    scores = logits.sigmoid().gather(1, chosen)
    assert_near(weights, scores / scores.sum(1, keepdim=True))
    assert_near(weights.sum(1), torch.ones(20))


def test_a_large_router_bias_does_not_raise_the_weight_of_an_expert():
    ffn, x = experts(n_experts_per_tok=4), torch.randn(9, 32)
    before = ffn(x)
    ffn.router_bias[3] = 1000.0
    assert ffn.route(x)[0][:, 0].eq(3).all()
    assert_near(ffn(x), before)


def test_the_router_bias_is_a_saved_buffer():
    ffn = experts()
    assert "router_bias" in ffn.state_dict() and "router_bias" not in dict(ffn.named_parameters())
    assert not ffn.router_bias.requires_grad


# -- balance


@pytest.mark.parametrize("wrap", ["plain", "checkpoint"])
def test_tokens_are_counted_until_the_experts_are_balanced(wrap):
    ffn = experts()

    def call(x: Tensor) -> Tensor:
        return ffn(x) if wrap == "plain" else checkpoint(ffn, x, use_reentrant=False)

    expected = ffn.router_bias.clone()
    for _ in range(4):
        load = torch.zeros(4)
        for _ in range(3):
            x = torch.randn(7, 32, requires_grad=True)
            call(x).square().mean().backward()
            assert torch.equal(ffn.router_bias, expected)
            load += load_of(ffn, x)
            assert ffn.expert_load.tolist() == load.tolist()
        balance(ffn)
        expected = moved(expected, load)
        assert_near(ffn.router_bias, expected, 1e-7)
        assert ffn.expert_load.eq(0).all()
    assert expected.ne(0).any()


def test_tokens_are_not_counted_in_eval_mode_or_without_gradients():
    ffn, x = experts(), torch.randn(16, 32, requires_grad=True)
    ffn.eval()(x)
    with torch.no_grad():
        ffn.train()(x + 0)
    assert ffn.expert_load.eq(0).all()
    balance(ffn)
    assert ffn.router_bias.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_router_bias_stays_float32_and_keeps_small_updates(dtype):
    ffn = experts()
    ffn.router_bias.fill_(2.0)
    for convert in (lambda: ffn.to(dtype), lambda: ffn.half(), lambda: ffn.bfloat16(), lambda: ffn.float()):
        convert()
        assert ffn.router_bias.dtype == torch.float32 and ffn.expert_load.dtype == torch.int64
    ffn.to(dtype)
    ffn.bias_rate = 1e-4
    ffn(torch.randn(16, 32, requires_grad=True).to(dtype)).float().sum().backward()
    balance(ffn)
    change = (ffn.router_bias - 2.0).abs()
    assert change.max() > 0 and change.max() < 2e-4


def test_padding_tokens_are_not_counted():
    ffn, x = experts(), torch.randn(2, 5, 32)
    x[0, :3] = 0
    ffn(x.requires_grad_())
    assert ffn.expert_load.sum() == 7 * 2


@pytest.mark.parametrize("n_experts, topk", [(4, 1), (4, 2), (8, 2)])
def test_balance_improves_on_skewed_inputs(n_experts, topk):
    torch.manual_seed(0)
    ffn = experts(n_experts=n_experts, n_experts_per_tok=topk)
    centre = 3 * torch.randn(32)

    def shares() -> Tensor:
        load = load_of(ffn, centre + torch.randn(200, 32))
        return load / load.sum()

    before = shares()
    for _ in range(600):
        ffn((centre + torch.randn(32, 32)).requires_grad_())
        balance(ffn)
    after = shares()
    assert before.min() < 0.05
    assert after.min() > 0.5 / n_experts and after.max() < 2 / n_experts, (before, after)


# -- in a model


def train(model: OpenMythos, optimizer: torch.optim.Optimizer, batches: Tensor, micro_batches: int = 1) -> list[float]:
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        for part in batch.chunk(micro_batches):
            loss = torch.nn.functional.cross_entropy(model(part[:, :-1], 3).flatten(0, 1), part[:, 1:].flatten())
            (loss / micro_batches).backward()
            losses.append(loss.item())
        optimizer.step()
    return losses


def new_run(**changes) -> tuple[OpenMythos, torch.optim.Optimizer]:
    model = tiny_model(router_bias_rate=RATE, **changes).train()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def test_activation_checkpointing_of_the_block_changes_nothing():
    batches = tokens(4, 4, 7)
    model, optimizer = new_run()
    expected = train(model, optimizer, batches, 2)
    twin, optimizer = new_run()
    block = twin.recurrent.block.forward
    twin.recurrent.block.forward = lambda *args, **options: (
        checkpoint(partial(block, **options), *args, use_reentrant=False)
        if torch.is_grad_enabled()
        else block(*args, **options)
    )
    assert train(twin, optimizer, batches, 2) == pytest.approx(expected, rel=1e-5)
    ffn, other = model.recurrent.block.ffn, twin.recurrent.block.ffn
    assert torch.equal(other.router_bias, ffn.router_bias)
    assert ffn.router_bias.abs().max() > RATE
    twin(batches[0], 3).sum().backward()
    assert other.expert_load.sum() == 4 * 7 * 3 * 2  # tokens, loops, experts per token


@pytest.mark.parametrize("make, options", [
    (torch.optim.SGD, dict(foreach=False)), (torch.optim.AdamW, dict(foreach=True)),
    (torch.optim.AdamW, dict(fused=True)), (torch.optim.RMSprop, {}),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_of_any_optimizer_balances_the_experts_once(make, options, micro_batches):
    model = tiny_model(router_bias_rate=RATE).train()
    ffn, optimizer = model.recurrent.block.ffn, make(model.parameters(), lr=1e-3, **options)
    expected = ffn.router_bias.clone()
    for _ in range(3):
        for ids in tokens(micro_batches, 2, 6):
            model(ids, 3).sum().backward()
            assert torch.equal(ffn.router_bias, expected)
        assert ffn.expert_load.sum() == micro_batches * 2 * 6 * 3 * 2  # this step's tokens only
        expected = moved(expected, ffn.expert_load.float())
        optimizer.step()
        assert_near(ffn.router_bias, expected, 1e-7)


def test_an_optimizer_of_another_model_does_not_balance_the_experts():
    model, other = tiny_model().train(), tiny_model().train()
    model(tokens(2, 5), 2).sum().backward()
    other(tokens(2, 5), 2).sum().backward()
    before = model.recurrent.block.ffn.router_bias.clone()
    torch.optim.SGD(other.parameters(), 0.1).step()
    assert torch.equal(model.recurrent.block.ffn.router_bias, before) and model.recurrent.block.ffn.expert_load.any()


@pytest.mark.parametrize("setting", ["eval", "no_grad", "auxiliary=False", "frozen experts"])
def test_the_router_bias_is_not_updated_when_experts_are_not_trained(setting):
    model, ids = tiny_model().train(setting != "eval"), tokens(4, 6)
    ffn = model.recurrent.block.ffn
    if setting == "frozen experts":  # as with adapters
        ffn.requires_grad_(False)
    before = ffn.router_bias.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
    for _ in range(2):
        with torch.set_grad_enabled(setting != "no_grad"):
            loss = model(ids, 2, auxiliary=setting != "auxiliary=False").mean()
        if setting != "no_grad":
            loss.backward()
        optimizer.step()
    assert torch.equal(ffn.router_bias, before)
    assert setting != "frozen experts" or not ffn.expert_load.any()


def test_an_averaged_model_can_be_made_before_the_first_step():
    model, optimizer = new_run()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    train(model, optimizer, tokens(2, 3, 7))
    average.update_parameters(model)
    train(model, optimizer, tokens(2, 3, 7))
    average.update_parameters(model)
    assert average.module(tokens(1, 4), 2).isfinite().all()


def test_a_copy_is_balanced_by_its_own_optimizer():
    model, _ = new_run()
    model(tokens(2, 5), 2).sum().backward()
    twin = deepcopy(model)
    before = twin.recurrent.block.ffn.router_bias.clone()
    torch.optim.SGD(model.parameters(), 1e-3).step()
    assert torch.equal(twin.recurrent.block.ffn.router_bias, before)
    twin(tokens(2, 5), 2).sum().backward()
    torch.optim.SGD(twin.parameters(), 1e-3).step()
    assert not torch.equal(twin.recurrent.block.ffn.router_bias, before)


def test_resuming_from_a_state_dict_changes_nothing():
    batches = tokens(6, 3, 7)
    model, optimizer = new_run()
    train(model, optimizer, batches)

    first, optimizer = new_run()
    train(first, optimizer, batches[:3])
    second = OpenMythos(first.cfg).train()
    second.load_state_dict(first.state_dict())
    resumed = torch.optim.AdamW(second.parameters(), lr=1e-3)
    resumed.load_state_dict(optimizer.state_dict())
    train(second, resumed, batches[3:])
    for name, value in model.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    assert model.recurrent.block.ffn.router_bias.ne(0).any()


def test_saving_and_loading_between_forward_and_step_keeps_token_counts():
    model, _ = new_run()
    model(tokens(2, 5), 2)
    twin = OpenMythos(model.cfg).train()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.recurrent.block.ffn.expert_load, model.recurrent.block.ffn.expert_load)


def test_expert_load_counts_all_loops_but_not_padding_or_generation():
    model, _ = new_run()
    model(tokens(2, 6), 5, attention_mask=left_padding([6, 4], 6)).sum().backward()
    ffn = model.recurrent.block.ffn
    assert ffn.expert_load.sum() == 10 * 5 * 2
    model.generate(tokens(2, 6), 3, n_loops=2)
    assert ffn.expert_load.sum() == 10 * 5 * 2 and ffn.router_bias.dtype == torch.float32


def test_the_router_gets_a_gradient_with_one_expert_per_token():
    ffn, x = experts(n_experts_per_tok=1), torch.randn(16, 32)
    ffn(x).square().sum().backward()
    assert ffn.router.weight.grad.abs().max() > 1e-3
