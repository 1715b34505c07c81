"""Queries of PyTorch's state around a call (autocast, tracing, backward pass, devices), all in one place."""

import torch
from torch import Tensor
from torch._guards import detect_fake_mode


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with ``x``: its own, or autocast's. PyTorch casts for its own operators only."""
    if x.dtype == torch.float64 or not autocasts(x.device):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on, under which weights that were fused beforehand would have the wrong dtype."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def is_traced() -> bool:
    """Whether ``torch.compile`` or ``torch.export`` traces the code: without complex numbers, or values of tensors."""
    return torch.compiler.is_compiling()


def has_values(x: Tensor) -> bool:
    """Whether the values of ``x`` can be read without waiting for a device, for checks of input."""
    return shapes_follow_values(x) and detect_fake_mode([x]) is None


def shapes_follow_values(x: Tensor) -> bool:
    """Whether shapes may depend on values of ``x``: not on a GPU, which stalls the host, nor in a traced graph."""
    return x.device.type == "cpu" and not is_traced()


def is_training_step() -> bool:
    """Whether a forward pass belongs to a training step: autograd is on, and no backward pass is recomputing it."""
    return torch.is_grad_enabled() and not in_backward()


def in_backward() -> bool:
    """Whether a backward pass is running, in which activation checkpointing runs forward passes again."""
    return torch._C._current_graph_task_id() != -1


def is_plain_inference(x: Tensor) -> bool:
    """Whether operations on ``x`` run without autograd, autocast and tracing, so that any kernel may compute them."""
    return not torch.is_grad_enabled() and not autocasts(x.device) and not is_traced()


def grouping_waits(x: Tensor) -> bool:
    """Whether grouped products of ``x`` are run one by one, so that the host waits for the groups' sizes: on a GPU,
    all but bfloat16 at compute capability 9 and 10 (PyTorch 2.13).
    """
    is_cuda = x.device.type == "cuda"
    return is_cuda and (x.dtype != torch.bfloat16 or torch.cuda.get_device_capability(x.device)[0] not in (9, 10))


def use_tf32(device: torch.device) -> None:
    """Let float32 products on CUDA use TF32, as tensor cores need; neither training nor inference suffers from it."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
