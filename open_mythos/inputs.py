"""Checks of what users pass in, before anything is computed."""

import numbers
from typing import Any

import torch
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.fields import must
from open_mythos.ops.attention import has_documents
from open_mythos.ops.dispatch import has_values

_INTEGERS = (torch.int64, torch.int32)


def check_ids(input_ids: Any, name: str = "input_ids") -> None:
    """ValueError unless ``input_ids`` is a non-empty (B, T) tensor of integers."""
    is_tensor = isinstance(input_ids, Tensor)
    if not is_tensor or input_ids.ndim != 2 or input_ids.dtype not in _INTEGERS or not input_ids.numel():
        what = f"{tuple(input_ids.shape)} {input_ids.dtype}" if is_tensor else type(input_ids).__name__
        raise ValueError(f"{name} is {what}; pass a non-empty (batch, tokens) tensor of int64 or int32")


def check_range(input_ids: Tensor, vocab_size: int, name: str = "input_ids") -> None:
    """ValueError for tokens outside [0, vocab_size); not checked where that would wait for a device."""
    if not has_values(input_ids):
        return
    low, high = int(input_ids.min()), int(input_ids.max())
    bad = low if low < 0 else high
    must(0 <= bad < vocab_size, f"{name} holds {bad}; token ids of this model are 0 to {vocab_size - 1}")


def check_input(cfg: MythosConfig, input_ids: Any, name: str = "input_ids") -> None:
    """ValueError unless ``input_ids`` are tokens of the model, (B, T), or embeddings, (B, T, dim)."""
    if isinstance(input_ids, Tensor) and input_ids.is_floating_point() and input_ids.ndim == 3:
        is_right = input_ids.numel() > 0 and input_ids.shape[2] == cfg.dim
        must(is_right, f"{name}: embeddings have shape {tuple(input_ids.shape)}; use (batch, tokens, {cfg.dim})")
    else:
        check_ids(input_ids, name)
        check_range(input_ids, cfg.vocab_size, name)


def check_mask(attention_mask: Any) -> None:
    """ValueError unless it is a tensor of 0 and 1, or of document numbers; values on a GPU are not read."""
    must(
        isinstance(attention_mask, Tensor),
        f"attention_mask is a {type(attention_mask).__name__}; pass a tensor (batch, tokens), 0 at padding",
    )
    dtype = attention_mask.dtype
    if dtype == torch.bool or not (dtype.is_complex or has_values(attention_mask)):
        return
    is_mask = not dtype.is_complex and bool((attention_mask >= 0).all())
    if is_mask and dtype.is_floating_point:
        is_mask = bool((attention_mask == attention_mask.floor()).all())
    must(
        is_mask,
        f"attention_mask of {dtype} holds values other than 0 (padding), 1 (tokens) and document numbers; additive "
        f"masks are not supported",
    )


def check_left_padding(attention_mask: Tensor | None, input_ids: Tensor) -> None:
    """ValueError unless the mask, if any, has the tokens' shape (B, T) and no padding after a token."""
    if attention_mask is None:
        return
    shapes = tuple(attention_mask.shape), tuple(input_ids.shape[:2])
    must(shapes[0] == shapes[1], f"attention_mask has shape {shapes[0]}; use {shapes[1]}, with 0 at padding")
    check_mask(attention_mask)
    must(
        not has_documents(attention_mask),
        "attention_mask numbers several documents, but a prompt is one document; use 1 at its tokens and 0 at padding",
    )
    is_token = attention_mask.bool()
    must(not is_token.int().diff(dim=1).lt(0).any(), "attention_mask has padding after tokens; pad prompts on the left")
    must(bool(is_token[:, -1].all()), "attention_mask has a row that is all padding; leave such prompts out")


def check_lengths(cfg: MythosConfig, input_ids: Tensor, max_new_tokens: int, name: str = "input_ids") -> None:
    """ValueError unless the prompt is valid input for a causal model of ``cfg``, and fits with its continuation."""
    check_input(cfg, input_ids, name)
    must(
        cfg.causal,
        "the model was built with causal=False and attends to later tokens, so it cannot generate; use causal=True",
    )
    limit = cfg.max_output_tokens
    must(0 <= max_new_tokens <= limit, f"max_new_tokens={max_new_tokens}; use 0 to max_output_tokens={limit}")
    T, limit, room = input_ids.shape[1], cfg.max_seq_len, cfg.max_text_len
    fix = f"use max_new_tokens={room - T} or less" if room > T else "shorten the prompt"
    must(
        T + max(max_new_tokens, 1) <= room,
        f"{T} prompt tokens and max_new_tokens={max_new_tokens} make {T + max_new_tokens}, but only {room} fit "
        f"(max_seq_len={limit}; the last new token is not fed back); {fix}, or raise max_seq_len in the model's config",
    )


def check_n_loops(n_loops: Any, default: int) -> int:
    """``n_loops``, or ``default`` for None.

    Raises:
        ValueError: unless it is an integer of at least 1.
    """
    if n_loops is None:
        n_loops = default
    if isinstance(n_loops, bool) or not isinstance(n_loops, numbers.Integral) or n_loops < 1:
        raise ValueError(f"n_loops={n_loops!r}; use an integer of at least 1, or None for max_loop_iters={default}")
    return int(n_loops)


def end_tokens(eos_token_id: int | tuple[int, ...] | None, vocab_size: int) -> tuple[int, ...]:
    """The tokens that end a sequence: one, several or none.

    Raises:
        ValueError: for one that is no token of the model.
    """
    ends = () if eos_token_id is None else (eos_token_id,) if isinstance(eos_token_id, int) else eos_token_id
    for end in ends:
        must(
            0 <= end < vocab_size,
            f"eos_token_id={eos_token_id}; use token ids of this model, 0 to {vocab_size - 1}, or None",
        )
    return ends


def check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    """ValueError for a generator of another device than ``device``, which tokens are drawn on."""
    must(
        generator is None or generator.device.type == device.type,
        f"generator is on {generator and generator.device}, but the model on {device}; create it on the model's device",
    )
