"""Layers are called as modules, so that hooks, pruning, parametrizations, torch.func and export work on them."""

import threading
from copy import deepcopy

import pytest
import torch
from helpers import ATTENTION, assert_near, tiny_config, tiny_model, tokens
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrize, prune

from open_mythos import KVCache
from open_mythos.model import UnrolledMythos


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".act." not in name}


@torch.no_grad()
@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.parametrize("n_experts", [0, 4])
def test_every_linear_layer_calls_its_hooks_for_prompts_and_single_tokens(attn_type, n_experts):
    model, cache = tiny_model(attn_type, n_experts=n_experts, halting=False), KVCache()
    layers, called = linears(model), set()
    assert len(layers) > 15
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: called.add(name))
    for n_tokens in (8, 1):
        called.clear()
        model(tokens(1, n_tokens), 2, cache)
        assert called == layers.keys()


@torch.no_grad()
def test_the_return_value_of_a_forward_hook_is_used():
    model, ids = tiny_model(halting=False), tokens(1, 6)
    steered = deepcopy(model)
    steered.recurrent.block.attn.wv.register_forward_hook(lambda _, args, out: out * 0)
    model.recurrent.block.attn.wv.weight.zero_()
    assert_near(steered(ids, 2), model(ids, 2), 1e-6)


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_pruned_layers_compute_with_the_remaining_weights_and_train(attn_type):
    model, ids = tiny_model(attn_type, halting=False, tied_head=False), tokens(2, 6)
    plain = deepcopy(model)
    for layer in linears(model).values():
        prune.l1_unstructured(layer, "weight", amount=0.5)
    with torch.no_grad():
        for name, layer in linears(plain).items():
            layer.weight.mul_(model.get_submodule(name).weight_mask)
        for part in (ids, ids[:, :1]):
            assert_near(model(part, 3), plain(part, 3))
    model.train()(ids, 3).square().mean().backward()
    down = model.coda[0].ffn.down
    assert down.weight_orig.grad[down.weight_mask.bool()].ne(0).any()


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_parametrized_layers_compute_with_the_parametrized_weight(attn_type):
    model, ids = tiny_model(attn_type, halting=False), tokens(2, 6)
    plain = deepcopy(model)
    names = [name for name in linears(model) if name != "head"]
    for name in names:
        parametrize.register_parametrization(model.get_submodule(name), "weight", Doubled())
        plain.get_submodule(name).weight.data.mul_(2)
    assert_near(model(ids, 3), plain(ids, 3))


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_gradients_of_functional_call_equal_those_of_backward(attn_type):
    """Of dense models only: torch.func cannot transform custom operators, such as the product of experts."""
    model, ids = tiny_model(attn_type, halting=False, n_experts=0), tokens(2, 6)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    moved = {name: 1.1 * p for name, p in parameters.items()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (ids, 2)).square().mean()

    found = torch.func.grad(loss)(moved)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model(ids, 2).square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert_near(found[name], parameter.grad, 1e-5, name)


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_threads_can_share_a_model(attn_type):
    """No call stores anything on a module that another call could read."""
    model = tiny_model(attn_type)
    texts = [tokens(1, n, seed=n) for n in (5, 9, 14, 7)]
    with torch.no_grad():
        alone = [model(ids, 3) for ids in texts]
    wrong: list[float] = []

    def call_model(i: int) -> None:
        with torch.no_grad():
            for _ in range(15):
                wrong.append((model(texts[i], 3) - alone[i]).abs().max().item())

    threads = [threading.Thread(target=call_model, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 60 and max(wrong) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("attn_type", ATTENTION)
def test_models_run_on_fake_and_meta_tensors(attn_type):
    with FakeTensorMode():
        model = tiny_model(attn_type, halting=False)
        assert model(torch.zeros(2, 7, dtype=torch.int64), 3).shape == (2, 7, 23)
    with torch.device("meta"):
        model = UnrolledMythos(tiny_config(attn_type)).eval()
        assert model(torch.zeros(2, 7, dtype=torch.int64)).shape == (2, 7, 23)


class Deep(nn.Module):
    """Encode, three loops, decode: what an exported graph holds."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        e, ctx = self.model.encode(ids)
        h = self.model.first_state(e, ctx)
        for state in self.model.recurrent.iterate(h, e, ctx, 3):
            h = state.h
        return self.model.head(self.model.decode(h, ctx))


@torch.no_grad()
@pytest.mark.parametrize("attn_type", ATTENTION)
@pytest.mark.filterwarnings("default")  # warnings of PyTorch itself
def test_a_whole_forward_pass_can_be_exported(attn_type):
    model, ids = tiny_model(attn_type, halting=False), tokens(2, 7)
    program = torch.export.export(Deep(model), (ids,))
    other = tokens(2, 7, seed=5)
    assert_near(program.module()(other), model(other, 3))


# -- a block for each loop


@pytest.mark.parametrize("attn_type", ATTENTION)
def test_an_unrolled_model_trains_a_separate_block_for_every_loop(attn_type):
    torch.manual_seed(0)
    model, ids = UnrolledMythos(tiny_config(attn_type, max_loop_iters=3)).eval(), tokens(2, 6)
    with torch.no_grad():
        e, ctx = model.encode(ids)
        h = e
        for loop, block in enumerate(model.recurrent.blocks):
            h = block.step(h, e, loop, ctx)
        assert_near(model(ids), model.head(model.decode(h, ctx)), 1e-6)
        cache = KVCache()
        parts = [model(part, kv_cache=cache) for part in ids.split([3, 1, 2], 1)]
        assert_near(torch.cat(parts, 1), model(ids))
    with pytest.raises(ValueError, match="n_loops=4, but this baseline has 3 blocks"):
        model(ids, 4)
    model.train()(ids).square().mean().backward()
    grads = [block.block.attn.wo.weight.grad for block in model.recurrent.blocks]
    assert all(grad.abs().sum() > 0 for grad in grads) and not torch.equal(grads[0], grads[1])
    before = [layer.ffn.router_bias.clone() for layer in model.recurrent.layers]
    torch.optim.SGD(model.parameters(), 0.1).step()
    moved = [layer.ffn.router_bias.ne(bias).any() for layer, bias in zip(model.recurrent.layers, before, strict=True)]
    assert len(moved) == 3 and all(moved)
