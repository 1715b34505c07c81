"""The number of operations of a loop, none of which makes the CPU wait for the device."""

import collections

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from open_mythos import KVCache, MythosConfig, OpenMythos

# Views of the same data: nothing is computed.
VIEWS = {
    "view", "transpose", "slice", "select", "unsqueeze", "squeeze", "expand", "as_strided", "t", "permute", "detach",
    "alias", "split", "split_with_sizes", "unbind", "_unsafe_view", "_reshape_alias", "unfold", "chunk", "movedim",
}  # fmt: skip
# Operations that read a value, or have an output shape that depends on values, and so wait for the device.
WAITS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "_unique",
    "_unique2",
    "unique_dim",
    "masked_select",
    "equal",
}
# Upper bounds of operations per loop: to decode a token, and in a training step, forward and backward.
BOUNDS = {("gqa", True): (60, 240), ("gqa", False): (45, 170), ("mla", True): (72, 290), ("mla", False): (60, 235)}


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found[function._schema.name.split("::")[1]] += 1
        return function(*args, **(kwargs or {}))


def a_model(attn_type: str, has_experts: bool, **changes) -> OpenMythos:
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=512, dim=256, n_heads=8, n_kv_heads=2, max_seq_len=512, max_loop_iters=16, prelude_layers=1,
        coda_layers=1, kv_lora_rank=64, q_lora_rank=128, qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=32,
        n_experts=8 if has_experts else 0, n_shared_experts=1, n_experts_per_tok=2, expert_dim=128, lora_rank=8,
        halting=False, warm_start=False,
    )  # fmt: skip
    return OpenMythos(MythosConfig(attn_type=attn_type, **{**sizes, **changes}))


def decoded(model: OpenMythos, n_loops: int) -> Count:
    ids, token, cache = torch.randint(512, (1, 32)), torch.randint(512, (1, 1)), KVCache()
    with torch.no_grad():
        for new in (ids, token):
            model(new, n_loops, cache)
        with Count() as count:
            model(token, n_loops, cache)
    return count


def trained(model: OpenMythos, n_loops: int) -> Count:
    ids = torch.randint(512, (4, 64))
    model(ids, n_loops).sum().backward()
    model.zero_grad()
    with Count() as count:
        model(ids, n_loops).sum().backward()
    return count


def of_a_loop(run, model: OpenMythos) -> tuple[float, dict[str, float]]:
    """Operations per loop: the number that compute something, and the numbers of all by name."""
    few, many = (run(model, n_loops).found for n_loops in (4, 8))
    found = {name: (n - few[name]) / 4 for name, n in many.items() if n != few[name]}
    return sum(n for name, n in found.items() if name not in VIEWS), found


@pytest.mark.parametrize("attn_type, has_experts", BOUNDS)
def test_a_loop_takes_few_operations_and_never_synchronises(attn_type, has_experts):
    in_decoding, in_training = BOUNDS[attn_type, has_experts]
    n, found = of_a_loop(decoded, a_model(attn_type, has_experts).eval())
    assert n <= in_decoding, found
    assert not WAITS & found.keys()
    n, found = of_a_loop(trained, a_model(attn_type, has_experts).train())
    assert n <= in_training, found
    assert not WAITS & found.keys()


@pytest.mark.parametrize("attn_type", ["gqa", "mla"])
def test_halting_with_fixed_shapes_never_synchronises(attn_type, monkeypatch):
    """As on a GPU. On a CPU, running positions are packed, for which they are counted."""
    from open_mythos.nn import recurrent

    for packs in (True, False):
        monkeypatch.setattr(recurrent, "shapes_follow_values", lambda x, packs=packs: packs)
        model = a_model(attn_type, True, halting=True).eval()
        torch.nn.init.normal_(model.recurrent.act.halt.weight, std=0.2)
        _, found = of_a_loop(decoded, model)
        assert bool(WAITS & found.keys()) == packs, found


@pytest.mark.parametrize(
    "wait", [lambda x: x.sum().item(), lambda x: x.nonzero(), lambda x: bool(x.any()), torch.unique]
)
def test_synchronising_operations_are_detected(wait):
    with Count() as count:
        wait(torch.ones(3))
    assert WAITS & count.found.keys()
