"""What one GPU of a layout holds and keeps, read off the model itself: its blocks run on tensors without storage."""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from open_mythos.checkpoint import without_storage
from open_mythos.config import MythosConfig
from open_mythos.model import OpenMythos
from open_mythos.nn.attention import Attention, GQAttention, LatentUp
from open_mythos.nn.feed_forward import Expert, MoEFFN
from open_mythos.training.objective import MAX_LOGITS, readout
from open_mythos.training.optim import decays

_COLUMNS, _ROWS = ("wq", "wk", "wv", "q_up", "kv_up", "gate", "up"), ("wo", "down")


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered and reduced together: how many, and of them those that Muon takes.

    ``is_routed`` are routed experts, which expert parallelism spreads; a GPU holds its share of them only.
    """

    name: str
    numel: int
    n_muon: int
    is_routed: bool = False


@dataclass(frozen=True)
class Piece:
    """Bytes that a part of a step keeps for its backward pass, and needs beside these while that runs.

    ``weights`` of the latter are gradients of weights on their way, and do not grow with tokens.
    """

    kept: float
    working: float
    weights: float

    def toward(self, other: "Piece", share: float) -> "Piece":
        """The mean of the two, in which ``other`` has this share."""
        mean = (a + share * (b - a) for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        return Piece(*mean)

    def needs(self, rows: float) -> float:
        """Bytes beside what so many rows keep."""
        return self.weights + rows * (self.working - self.weights)


@dataclass(frozen=True)
class Pieces:
    """Of a row of tokens: what is around the blocks, a block of prelude or coda, a loop; the loss of ``loss_tokens``.

    Gradients of routed experts, which depend on how many a GPU has, are not among what a loop needs.
    """

    ends: Piece
    block: Piece
    loop: Piece
    loss: Piece
    loss_tokens: int


def shared(model: OpenMythos) -> dict[str, dict[int, str]]:
    """Which dimensions of which parameters are divided, by name: over ``tensor``, or over ``expert``.

    Heads, feed-forwards, embedding and head over ``tensor``, as are the widths of experts, which themselves are over
    ``expert``; norms, routers and the way into MLA's latents are everywhere.
    """
    found: dict[str, dict[int, str]] = {"embed.weight": {0: "tensor"}, "head.weight": {0: "tensor"}}
    for path, module in model.named_modules():
        if isinstance(module, MoEFFN):
            found |= {f"{path}.gate_up": {0: "expert", 1: "tensor"}, f"{path}.down": {0: "expert", 2: "tensor"}}
        if isinstance(module, Attention | Expert):
            names = [name for name, part in module.named_children() if isinstance(part, nn.Linear)]
            found |= {f"{path}.{name}.weight": {0: "tensor"} for name in names if name in _COLUMNS}
            found |= {f"{path}.{name}.weight": {1: "tensor"} for name in names if name in _ROWS}
        if isinstance(module, GQAttention):
            found |= {f"{path}.{name}.taps": {1: "tensor"} for name in ("k_conv", "v_conv")}
    return found


def local_shape(shape: torch.Size, divided: dict[int, str], tensor: int, expert: int) -> list[int]:
    """Of one GPU's share of a parameter, rounded up."""
    parts = {"tensor": tensor, "expert": expert}
    return [-(-size // parts[divided[dim]]) if dim in divided else size for dim, size in enumerate(shape)]


def local_model(config: str, tensor: int, expert: int) -> OpenMythos:
    """The model of one GPU, on the meta device; ``tensor`` divides its heads."""
    model = without_storage(OpenMythos, MythosConfig.from_json(config))
    divided, n = shared(model), tensor
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        local = torch.empty(local_shape(parameter.shape, divided.get(name, {}), n, expert), device="meta")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(local))
    if model.cfg.tied_head:
        model.head.weight = model.embed.weight
    for module in model.modules():
        for name in ("n_heads", "n_kv_heads", "n_local_heads") if isinstance(module, Attention | LatentUp) else ():
            if name in vars(module):
                setattr(module, name, -(-getattr(module, name) // n))
    return model


@lru_cache(maxsize=256)
def units(config: str, tensor: int = 1, expert: int = 1) -> list[Unit]:
    """What is gathered and reduced together: each block of prelude and coda, the core, its experts, and the rest.

    Of one GPU, as :func:`local_model`.
    """
    found: dict[str, list[int]] = {}
    for unit, shape, divided, is_muon in _parameters(config):
        numel = math.prod(local_shape(shape, divided, tensor, expert))
        sizes = found.setdefault(unit, [0, 0])
        sizes[0] += numel
        sizes[1] += numel * is_muon
    return [Unit(name, numel, n_muon, name == "experts") for name, (numel, n_muon) in found.items()]


@lru_cache(maxsize=4)
def _parameters(config: str) -> list[tuple[str, torch.Size, dict[int, str], bool]]:
    """Of each: its unit, shape, divided dimensions, and whether it is one that Muon takes."""
    model = without_storage(OpenMythos, MythosConfig.from_json(config))
    divided, found = shared(model), []
    for name, parameter in model.named_parameters():
        first, _, rest = name.partition(".")
        unit = "core" if first == "recurrent" else "root"
        unit = "experts" if "expert" in divided.get(name, {}).values() else unit
        unit = f"{first}.{rest.partition('.')[0]}" if first in ("prelude", "coda") else unit
        in_block = first in ("prelude", "coda") or name.startswith("recurrent.block.")
        is_muon = in_block and parameter.ndim == 2 and decays(name, parameter)
        found.append((unit, parameter.shape, divided.get(name, {}), is_muon))
    return found


def tensor_degrees(cfg: MythosConfig) -> list[int]:
    """Degrees of tensor parallelism that divide the heads."""
    heads = math.gcd(cfg.n_heads, cfg.n_kv_heads) if cfg.attn_type == "gqa" else cfg.n_heads
    return [degree for degree in range(1, heads + 1) if heads % degree == 0]


@lru_cache(maxsize=64)
def pieces(config: str, tensor: int, length: int, dtype: torch.dtype) -> Pieces:
    """What the parts of a step keep and need for one row of ``length`` tokens, on one of ``tensor`` GPUs.

    Of a width that is divided by n, what is kept is ``a + b / n``; measured whole, and divided as far as heads allow.
    """
    most = tensor_degrees(MythosConfig.from_json(config))[-1]
    whole = measured(config, 1, length, dtype)
    if tensor == 1:
        return whole
    divided, share = measured(config, most, length, dtype), (1 - 1 / tensor) / (1 - 1 / most)
    parts = (getattr(whole, name).toward(getattr(divided, name), share) for name in ("ends", "block", "loop", "loss"))
    ends, block, loop, loss = parts
    return Pieces(ends, block, loop, loss, whole.loss_tokens)


@lru_cache(maxsize=16)
def measured(config: str, tensor: int, length: int, dtype: torch.dtype) -> Pieces:
    """:func:`pieces` of a model whose heads ``tensor`` divides, by the kernels of a CPU.

    Its norms and attention keep more than the fused ones of a GPU do, so for that it is an upper bound.
    """
    n_experts = MythosConfig.from_json(config).n_experts
    model = local_model(config, tensor, max(1, n_experts // 2)).train()  # of one expert alone, no tokens are grouped
    core, n_loss = model.recurrent, max(1, min(length, MAX_LOGITS // model.cfg.vocab_size))
    blocks = [*model.coda, *model.prelude]
    del model.prelude[:], model.coda[:]
    with FakeTensorMode(), _Live() as live:
        for module in (model, *blocks[:1]):
            _store(module, dtype)
        if model.cfg.tied_head:
            model.head.weight = model.embed.weight
        ids = torch.zeros(1, length, dtype=torch.int64)
        e, ctx = model.encode(ids)
        h, held, x = tree_map_only(Tensor, lambda x: x.detach().requires_grad_(), (e, core.prepare(e), e[0, :n_loss]))
        targets, weights = torch.zeros(n_loss, dtype=torch.int64), torch.ones(n_loss)
        core.step(h, held, 0, ctx)  # makes masks, which all loops share
        return Pieces(
            live.piece([], lambda: model.decode(core.prepare(model.encode(ids)[0]).injected, ctx)),
            live.piece(blocks[:1], lambda: blocks[0](h, ctx)) if blocks else Piece(0, 0, 0),
            live.piece([core], lambda: core.step(h, held, 0, ctx)),
            live.piece([model.head], lambda: readout(model.head, x, targets, weights, n_loss)[0].sum()),
            n_loss,
        )


class _Live(TorchDispatchMode):
    """Bytes of tensors that operators made inside and that still live, and the most that did."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.known = weakref.WeakKeyDictionary[Any, None]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (storage := x.untyped_storage()) not in self.known:
                self.known[storage] = None
                self.bytes += storage.nbytes()
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self._free, storage.nbytes())
        return out

    def _free(self, size: int) -> None:
        self.bytes -= size

    def piece(self, modules: list[nn.Module], work: Callable[[], Tensor]) -> Piece:
        """What ``work`` keeps and needs, with the parameters of these modules."""
        before = self.bytes
        out = work()
        kept, self.peak = self.bytes - before, self.bytes
        out.backward(torch.empty_like(out))
        working = self.peak - before - kept
        largest = max((p.nbytes for module in modules for p in module.parameters()), default=0)
        return Piece(kept, working, min(working, 2 * largest))  # the product, and the product times its scale


def _store(model: nn.Module, dtype: torch.dtype) -> None:
    """Give parameters, in ``dtype`` and with gradients, and buffers tensors of the mode around."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                stored = nn.Parameter(torch.empty(parameter.shape, dtype=dtype))
                module._parameters[name], stored.grad = stored, torch.empty_like(stored)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
