"""Tiny models as classes of transformers, and a tokenizer for them."""

from __future__ import annotations

from typing import Any

import torch
from helpers import tiny_model, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from open_mythos.integrations.hf import OpenMythosForCausalLM


def wrapped(attn_type: str = "gqa", **changes: Any) -> OpenMythosForCausalLM:
    """A causal language model; arguments as :func:`tiny_model`."""
    return OpenMythosForCausalLM.wrap(tiny_model(attn_type, **changes), pad_token_id=0, eos_token_id=None)


def greedy(lm: Any, ids: Tensor | None, n: int = 6, **options: Any) -> Tensor:
    """The prompt and ``n`` more tokens, decoded greedily unless ``options`` say otherwise."""
    options = {"do_sample": False, **options}
    if ids is not None:
        options.setdefault("attention_mask", torch.ones_like(ids))
    return lm.generate(input_ids=ids, max_new_tokens=n, **options)


def letters(n: int = 23) -> PreTrainedTokenizerFast:
    """One token per letter: a padding token, an end of text, and ``n - 2`` letters."""
    names = ["<pad>", "<eos>", *(chr(ord("a") + i) for i in range(n - 2))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def prompts(*shape: int) -> Tensor:
    """Random token ids without the padding token."""
    return tokens(*shape, high=22) + 1
