"""Parameters and activations of one GPU of a layout, measured by running the model's blocks on fake tensors."""

import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
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
from open_mythos.nn.feed_forward import Expert, MoEFFN
from open_mythos.training.objective import MAX_LOGITS, readout
from open_mythos.training.optim import decays

_MOST_TENSOR = 256


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered and reduced together, as :mod:`open_mythos.training.parallel` divides a model.

    Attributes:
        name: of the block, or of the part of it.
        numel: number on one GPU before FSDP divides them; of these ``n_muon`` are trained by Muon, ``n_routed`` belong
            to routed experts, and ``n_core`` to blocks that run in every loop.
        is_routed: whether it holds routed experts that expert parallelism divides.
    """

    name: str
    numel: int
    n_muon: int
    n_routed: int
    n_core: int
    is_routed: bool


@dataclass(frozen=True)
class Piece:
    """Bytes that a part of a step keeps for its backward pass, and extra bytes needed while that runs (``working``).

    Of the latter, ``weights`` are temporary gradients of weights, and do not grow with tokens.
    """

    kept: float
    working: float
    weights: float

    def toward(self, other: "Piece", share: float) -> "Piece":
        """Linear interpolation between the two, with weight ``share`` on ``other``."""
        mean = (a + share * (b - a) for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        return Piece(*mean)

    def needs(self, rows: float) -> float:
        """Extra bytes that the backward pass of ``rows`` rows needs beside what they keep."""
        return self.weights + rows * (self.working - self.weights)


@dataclass(frozen=True)
class Pieces:
    """Bytes for one row of tokens: for what is outside the blocks, a block of prelude or coda, a loop; for the loss of
    ``loss_tokens``; and of a state between loops.

    Those of a loop exclude gradients of routed experts, which depend on the number of experts on a GPU.
    """

    ends: Piece
    block: Piece
    loop: Piece
    loss: Piece
    loss_tokens: int
    state: float


def divided(model: OpenMythos) -> dict[str, dict[int, str]]:
    """Dimensions along which parameters are divided, by name: dense feed-forwards and shared experts over ``tensor``,
    the vocabulary too if its size is divisible; routed experts over ``expert``; all others are not divided.
    """
    found: dict[str, dict[int, str]] = {f"{name}.weight": {0: "vocabulary"} for name in ("embed", "head")}
    for path, module in model.named_modules():
        if isinstance(module, MoEFFN):
            found |= {f"{path}.{name}": {0: "expert"} for name in ("gate_up", "down")}
        elif isinstance(module, Expert):
            found |= {f"{path}.{name}.weight": {dim: "tensor"} for name, dim in (("gate", 0), ("up", 0), ("down", 1))}
    return found


def local_shape(shape: torch.Size, dims: dict[int, str], tensor: int, expert: int) -> list[int]:
    """Shape of one GPU's part of a parameter, rounded up."""
    parts = {"tensor": tensor, "expert": expert, "vocabulary": tensor if shape[0] % tensor == 0 else 1}
    return [-(-size // parts[dims[dim]]) if dim in dims else size for dim, size in enumerate(shape)]


@lru_cache(maxsize=256)
def units(config: str, tensor: int = 1, expert: int = 1, slices: int = 1) -> list[Unit]:
    """FSDP units: every block and the rest; with expert parallelism, the experts of every layer and the rest.

    Where ``slices`` GPUs divide the same experts, routers and shared experts are units too.
    """
    found: dict[str, list[int]] = {}
    for name, shape, dims, is_muon in _parameters(config):
        words, is_routed, is_core = name.split("."), "expert" in dims.values(), name.startswith("recurrent.block.")
        unit = "root"
        if expert > 1 and ".ffn." in name and is_core:
            ffn, _, part = name.partition(".ffn.")
            if is_routed:
                unit = f"{ffn}.ffn"
            elif slices > 1:
                unit = f"{ffn}.ffn.{part.partition('.')[0]}"
        elif expert == 1 and (is_core or words[0] in ("prelude", "coda")):
            unit = ".".join(words[: 3 if is_core and words[2].isdigit() else 2])
        numel = math.prod(local_shape(shape, dims, tensor, expert))
        sizes = found.setdefault(unit, [0, 0, 0, 0])
        for i, counts in enumerate((True, is_muon, is_routed, is_core)):
            sizes[i] += numel * counts
    return [
        Unit(name, numel, n_muon, n_routed, n_core, expert > 1 and name.endswith(".ffn"))
        for name, (numel, n_muon, n_routed, n_core) in found.items()
    ]


@lru_cache(maxsize=4)
def _parameters(config: str) -> list[tuple[str, torch.Size, dict[int, str], bool]]:
    """Name, shape and divided dimensions of each parameter, and whether Muon trains it."""
    model = without_storage(OpenMythos, MythosConfig.from_json(config))
    dims, found = divided(model), []
    for name, parameter in model.named_parameters():
        in_block = name.startswith(("prelude.", "coda.", "recurrent.block."))
        is_muon = in_block and parameter.ndim == 2 and decays(name, parameter)
        found.append((name, parameter.shape, dims.get(name, {}), is_muon))
    return found


def tensor_degrees(cfg: MythosConfig) -> list[int]:
    """Possible degrees of tensor parallelism: divisors of the width of every feed-forward that all tokens pass."""
    widths = [cfg.ffn_dim] * (cfg.prelude_layers + cfg.coda_layers > 0 or not cfg.n_experts)
    common = math.gcd(*widths, cfg.shared_dim if cfg.n_experts else 0)
    return [degree for degree in range(1, min(common, _MOST_TENSOR) + 1) if common % degree == 0] or [1]


@lru_cache(maxsize=64)
def pieces(config: str, tensor: int, length: int, is_bf16: bool) -> Pieces:
    """Bytes that the parts of a step keep and need for one row of ``length`` tokens, on one of ``tensor`` GPUs.

    Bytes are ``a + b / n`` if n GPUs divide a width, so they are measured for n = 1 and 2 and extrapolated.
    """
    whole = measured(config, 1, length, is_bf16)
    if tensor == 1:
        return whole
    other, share = measured(config, 2, length, is_bf16), 2 * (1 - 1 / tensor)
    names = ["block", "loop"] + ["loss"] * (MythosConfig.from_json(config).vocab_size % tensor == 0)
    return replace(whole, **{name: getattr(whole, name).toward(getattr(other, name), share) for name in names})


@lru_cache(maxsize=16)
def measured(config: str, tensor: int, length: int, is_bf16: bool) -> Pieces:
    """:func:`pieces`, measured with CPU kernels: an upper bound for a GPU, whose norms and attention keep less."""
    cfg = MythosConfig.from_json(config)
    model = without_storage(OpenMythos, cfg).train()
    dims = divided(model)
    core, n_loss = model.recurrent, max(1, min(length, MAX_LOGITS // model.cfg.vocab_size))
    few = max(1, cfg.n_experts // 2)  # degree that leaves two experts: with one alone, tokens would not be grouped
    with FakeTensorMode(), Live() as live, torch.autocast("cpu", torch.bfloat16, enabled=is_bf16, cache_enabled=False):
        for name, parameter in list(model.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            shape = local_shape(parameter.shape, dims.get(name, {}), tensor, few)
            stored = nn.Parameter(torch.empty(shape))
            setattr(model.get_submodule(owner), leaf, stored)
            stored.grad = torch.empty_like(stored)
            live.weights[stored.untyped_storage()] = None
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)
        if cfg.tied_head:
            model.head.weight = model.embed.weight
        blocks = [*model.coda, *model.prelude]
        del model.prelude[:], model.coda[:]
        ids = torch.zeros(1, length, dtype=torch.int64)
        e, ctx = model.encode(ids)
        given = model.first_state(e, ctx), core.prepare(e), e[0, :n_loss]
        h, held, x = tree_map_only(Tensor, lambda x: x.detach().requires_grad_(), given)
        targets, weights = torch.zeros(n_loss, dtype=torch.int64), torch.ones(n_loss)
        state = core.step(h, held, 0, ctx)  # also makes the masks, which all loops share
        return Pieces(
            live.piece([], lambda: model.decode(model.first_state(model.encode(ids)[0], ctx), ctx)),
            live.piece(blocks[:1], lambda: blocks[0](held.e, ctx)) if blocks else Piece(0, 0, 0),
            live.piece([core], lambda: core.step(h, held, 0, ctx)),
            live.piece([model.head], lambda: readout(model.head, x, targets, weights, n_loss)[0].sum()),
            n_loss,
            state.nbytes,
        )


class Live(TorchDispatchMode):
    """Dispatch mode that counts the bytes of live tensors made by operators inside it, and their peak.

    Copies of ``weights``, such as autocast makes, are not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.known = weakref.WeakKeyDictionary[Any, None]()
        self.weights = weakref.WeakKeyDictionary[Any, None]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        is_copy = func is torch.ops.aten._to_copy.default and args[0].untyped_storage() in self.weights
        self.record((x for x in tree_leaves(out) if isinstance(x, Tensor)), not is_copy)
        return out

    def record(self, tensors: Iterable[Tensor], is_counted: bool = True) -> None:
        """Count the tensors that an operator returned; storage is counted once."""
        for x in tensors:
            if (storage := x.untyped_storage()) not in self.known:
                self.known[storage] = None
                if is_counted:
                    self.bytes += storage.nbytes()
                    self.peak = max(self.peak, self.bytes)
                    weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.bytes -= size

    def piece(self, modules: list[nn.Module], work: Callable[[], Tensor]) -> Piece:
        """Measure what ``work`` keeps, and what its backward pass needs; ``modules`` own its parameters."""
        before = self.bytes
        out = work()
        kept, self.peak = self.bytes - before, self.bytes
        out.backward(torch.empty_like(out))
        working = self.peak - before - kept
        largest = max((p.nbytes for module in modules for p in module.parameters()), default=0)
        return Piece(kept, working, min(working, 2 * largest))  # the product, and the product times its scale
