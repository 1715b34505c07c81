"""A simulated GPU: what a step would require of a GPU, found on a CPU by running the step on tensors without storage.

Within ``with Pretend() as gpu:``, tensors on the device "pretend" have shapes, dtypes and a device, but no data. So the
code takes the same paths as on a GPU, autocast and the fused optimizer included, and errors of a GPU also occur here:
tensors of two devices in one operator, a shape that depends on data. It counts operators that launch kernels,
synchronisations of the host with the device, the kernels that attention takes, and bytes.
"""

import sys
from collections import Counter
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

from open_mythos.planning.rank import Live

NAME = "pretend"
CAST = ("linear", "addmm", "mm", "bmm", "baddbmm", "matmul")  # that CUDA's autocast runs in half precision
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view", "device", "lift_fresh"}
_registered: list[Any] = []


def register() -> None:
    """Register the device with PyTorch, and how autocast treats operators on it.

    Called once per process, before its first backward pass, which looks up the devices that exist.
    """
    if _registered:
        return
    backend = backend_registration._DummyBackendModule()
    backend.get_amp_supported_dtype = lambda: [torch.bfloat16]
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend)
    rest, ours = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for name in CAST:
        ours.impl(name, _casting(getattr(torch.ops.aten, name).default), "AutocastPrivateUse1")
    _registered.extend([rest, ours])


def _casting(operator: Any) -> Any:
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def run(*args: Any, **options: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(key):
            return operator(*map(_half, args), **options)

    return run


def _half(x: Any) -> Any:
    return x.to(torch.get_autocast_dtype(NAME)) if isinstance(x, Tensor) and x.dtype == torch.float32 else x


class Pretend(Live):
    """The simulated GPU as a context, which counts what happens inside it.

    Attributes:
        launches: how often each operator that starts at least one kernel was run.
        waits: the lines of code at which the host waited for the device, once for each visit of a line.
        kernels: how often attention took each kernel, see :func:`kernel`.
        bytes, peak: the bytes of live tensors on the device, now and at most.
    """

    def __init__(self) -> None:
        register()
        super().__init__()
        self.launches, self.kernels = Counter[str](), Counter[str]()
        self.waits = list[str]()
        self._fake, self._attention = FakeTensorMode(allow_non_fake_inputs=True), _Attention(self)

    def __enter__(self) -> "Pretend":
        self._fake.__enter__()
        self._attention.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._attention.__exit__(*error)
        self._fake.__exit__(*error)

    def reset(self) -> None:
        """Start counting again; live tensors stay counted in ``bytes``."""
        self.launches.clear()
        self.kernels.clear()
        self.waits.clear()
        self.peak = self.bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here, to = [x for x in tensors if x.device.type == NAME], kwargs.get("device")
        to = None if to is None else torch.device(to).type
        if name in ("_pin_memory", "is_pinned"):
            return args[0] if name == "_pin_memory" else False
        if name == "_local_scalar_dense" and here:
            self._wait(name)
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        if here and to == "cpu":
            self._wait(name)
            with unset_fake_temporarily():
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if not here and to != NAME:
            if any(isinstance(x, FakeTensor) for x in tensors):  # such as those made by torch.tensor()
                return func(*args, **kwargs)
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        is_copy = name in ("_to_copy", "copy_")
        is_free = is_copy and (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
        if any(x.device.type == "cpu" and (x.ndim or is_copy) for x in tensors) and not is_free:
            self._wait(name)
        args, kwargs = tree_map_only(Tensor, self._without_numbers, (args, kwargs))
        out = func(*args, **kwargs)
        if name not in FREE and not (func.is_view and not func._schema.is_mutable):
            self.launches[name] += 1
        self.record(x for x in tree_leaves(out) if isinstance(x, Tensor))
        return out

    def _without_numbers(self, x: Tensor) -> Tensor:
        if isinstance(x, FakeTensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)

    def _wait(self, name: str) -> None:
        where = f"{name} at {place(sys._getframe(2))}"
        if self.waits[-1:] != [where]:
            self.waits.append(where)


def place(frame: FrameType | None) -> str:
    """The innermost line of this library on the call stack of ``frame``."""
    while frame is not None and "open_mythos/" not in frame.f_code.co_filename:
        frame = frame.f_back
    if frame is None:
        return "elsewhere"
    return f"{frame.f_code.co_filename.rpartition('open_mythos/')[2]}:{frame.f_lineno}"


class _Attention(TorchFunctionMode):
    """Runs attention with the kernel that a GPU would choose."""

    def __init__(self, counts: Pretend) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.rms_norm and args[0].device.type == NAME:
            return _Norm.apply(self.counts, args[0], kwargs.get("weight"))
        if func is not F.scaled_dot_product_attention or args[0].device.type != NAME:
            return func(*args, **kwargs)
        q, k, v = map(_half, args) if torch.is_autocast_enabled(NAME) else args
        bias, is_causal, scale = kwargs["attn_mask"], kwargs["is_causal"], kwargs["scale"]
        chosen = kernel(q, k, v, bias, is_causal)
        self.counts.kernels[chosen] += 1
        if chosen == "flash":
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False, scale=scale)[0]
        if chosen == "efficient":
            bias = None if bias is None else bias.to(q.dtype).expand(*q.shape[:3], k.shape[2])
            options = q.requires_grad or k.requires_grad, 0.0, is_causal
            return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, *options, scale=scale)[0]
        return func(q, k, v, **kwargs)


class _Norm(torch.autograd.Function):
    """RMS norm as one fused kernel, as on CUDA; for a device that it does not know, PyTorch would decompose it."""

    @staticmethod
    def forward(ctx: Any, counts: Pretend, x: Tensor, weight: Tensor | None) -> Tensor:
        counts.launches["_fused_rms_norm"] += 1
        ctx.counts = counts
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        ctx.counts.launches["_fused_rms_norm_backward"] += 1 if weight is None else 2
        return None, torch.empty_like(x), None if weight is None else torch.empty_like(weight)


def kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool) -> str:
    """The kernel for tensors (B, H, T, D), by the rules of PyTorch's ``sdp_utils.cpp`` for compute capability 9.

    cuDNN's kernel, which recent versions prefer where it is available, is left out, as are cases that only versions
    after 2.14 support.
    """
    D, Dv, is_half = q.shape[-1], v.shape[-1], q.dtype in (torch.bfloat16, torch.float16)
    is_square = q.shape[2] == k.shape[2]
    if is_half and bias is None and D == Dv <= 256 and (is_square or not is_causal):
        return "flash"
    aligned, same_heads = 8 if is_half else 4, q.shape[1] == k.shape[1]
    return "efficient" if same_heads and D % aligned == Dv % aligned == 0 else "math"
