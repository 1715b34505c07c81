"""Int8 weights for a trained model, in a quarter of float32's memory. Needs the ``quant`` extra (torchao).

Symmetric, with a scale for each output channel, in every expert its own; products are made in the dtype of the model.
The matrices of prelude, recurrent block and coda become int8, but for the router, which decides more than it weighs,
and MLA's ``kv_up``, which attention takes apart. Embedding, head, gate, LoRA, bridge, norms,
convolutions and injection stay.

Speed: a decoding step of a large model takes as long as reading its weights, of which int8 has half the bytes of
bfloat16. On a CPU PyTorch's int8 product makes that pay in a bfloat16 model, for up to 16 tokens at a time and layers
whose fan-in is a multiple of 32. Everywhere else an eager product first turns the weight back, which saves memory but
no time. What there is to win and to lose is measured by ``benchmarks/decoding.py --only int8``.

``torch.compile`` works in float32; in bfloat16 PyTorch 2.13 fails on a whole block for a CPU (InductorError).
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from open_mythos.fields import must
from open_mythos.install import missing
from open_mythos.interface import Model
from open_mythos.nn.feed_forward import MoEFFN
from open_mythos.nn.linear import Linear
from open_mythos.nn.modes import is_evaluating

Quantised = TypeVar("Quantised", bound=Model)
_LEFT_ALONE = ("router", "kv_up")


@torch.no_grad()
def quantize_int8(model: Quantised) -> Quantised:
    """Turn the matrices of a model's blocks into int8, in place.

    The model then computes in the dtype that it has, which ``.to(dtype)`` changes as ever, and generates, halts and is
    evaluated as before, with slightly other logits. It can neither be trained nor saved: save it before, and quantise
    what is loaded, which takes a moment.

    Returns:
        ``model``, which has to be in eval mode.

    Raises:
        ImportError: naming the extra to install, without ``torchao``.
        ValueError: for a model in training mode, or one that is quantised, sharded or adapted already.
    """
    try:
        with _importing_quietly():
            from open_mythos.quantization.weights import Int8Weight, use_int8_experts
    except ImportError as error:
        raise missing("quantize_int8 needs torchao", "quant") from error
    training = "the model is in training mode, and int8 weights cannot be trained; call model.eval() first"
    must(not model.training, training)
    blocks = [*model.prelude, *model.recurrent.layers, *model.coda]
    for block in blocks:
        for name, weight in block.named_parameters():
            plain = "quantise plain weights only, once, and before the model is wrapped"
            must(type(weight) is nn.Parameter, f"{name} has type {type(weight).__name__}; {plain}")
    for block in blocks:
        for name, module in block.named_modules():
            if isinstance(module, Linear) and name.rpartition(".")[2] not in _LEFT_ALONE:
                module.weight = Int8Weight.parameter(module.weight)
            elif isinstance(module, MoEFFN):
                use_int8_experts(module)
    for block in model.recurrent.layers:
        block.register_forward_pre_hook(_refuse_training)
    return model


def _refuse_training(block: nn.Module, _: Any) -> None:
    untrainable = (
        "this model's weights are int8 and cannot be trained; call model.eval(), or train before quantize_int8"
    )
    must(not block.training or is_evaluating(), untrainable)


@contextmanager
def _importing_quietly() -> Iterator[None]:
    """torchao reports that kernels which nothing here uses did not load, and PyTorch that it uses an old function."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, with scales and offsets of those that are int8; tied ones count once."""
    n_bytes = 0
    for weight in model.parameters():
        flatten = getattr(weight, "__tensor_flatten__", None)
        n_bytes += weight.nbytes if flatten is None else sum(getattr(weight, name).nbytes for name in flatten()[0])
    return n_bytes
