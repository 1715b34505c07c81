"""The one place that asks PyTorch what is going on around a call."""

import torch
from torch import Tensor
from torch._guards import detect_fake_mode


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with ``x``: its own, or autocast's. PyTorch casts for its own operators only."""
    if x.dtype == torch.float64 or not autocasts(x.device):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on, under which weights that were fused beforehand have the wrong dtype."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def is_traced() -> bool:
    """Whether ``torch.compile`` or ``torch.export`` is reading the code: neither knows complex numbers, nor values."""
    return torch.compiler.is_compiling()


def has_values(x: Tensor) -> bool:
    """Whether the numbers in ``x`` can be looked at without waiting for a device, as an error message needs them."""
    return shapes_follow_values(x) and detect_fake_mode([x]) is None


def shapes_follow_values(x: Tensor) -> bool:
    """Whether shapes may depend on numbers in ``x``: a GPU would have to be waited for, and a graph knows no values."""
    return x.device.type == "cpu" and not is_traced()


def is_training_step() -> bool:
    """Whether a forward pass is part of a training step: gradients are recorded, and none are being computed."""
    return torch.is_grad_enabled() and not in_backward()


def in_backward() -> bool:
    """Whether gradients are being computed: activation checkpointing then runs forward passes again."""
    return torch._C._current_graph_task_id() != -1


def is_plain_inference(x: Tensor) -> bool:
    """Whether operations on ``x`` are neither recorded, cast nor traced, so that any kernel will do."""
    return not torch.is_grad_enabled() and not autocasts(x.device) and not is_traced()


def grouping_waits(x: Tensor) -> bool:
    """Whether grouped products of ``x`` are one a group, whose sizes the host waits for: on a GPU, all but those in
    bfloat16 of compute capability 9 and 10 (PyTorch 2.13).
    """
    is_cuda = x.device.type == "cuda"
    return is_cuda and (x.dtype != torch.bfloat16 or torch.cuda.get_device_capability(x.device)[0] not in (9, 10))


def use_tf32(device: torch.device) -> None:
    """Let float32 products on CUDA use TF32: tensor cores need it, and neither training nor inference suffers."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
