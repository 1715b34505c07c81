"""Converting a pretrained decoder to a recurrent-depth model. Needs the ``hf`` extra.

The first layers become the prelude, the last the coda, those right before it the core, and the rest is dropped (McLeish
et al. 2025, "Retrofitted Recurrence", arXiv:2511.07384, who add a linear adapter and start from noise). Here the state
starts as the prelude's output e and ``A + B = 1``, so that ``A h + B e`` is e: one loop is the original's kept layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from open_mythos import files
from open_mythos.checkpoint import remove_earlier
from open_mythos.config import MythosConfig
from open_mythos.fields import must
from open_mythos.integrations.original import check_family
from open_mythos.model import OpenMythos
from open_mythos.models import remove_beside

TOLERANCE = 1e-4
"""Largest accepted difference between the logits of the original's kept layers and of the new model at one loop, in
units of the largest logit where that is above 1."""


@dataclass(frozen=True)
class Split:
    """How many layers go into each part; validated at construction.

    Raises:
        ValueError: for a number below 0, or a core of no layers.
    """

    prelude: int = 4
    core: int = 8
    coda: int = 4

    def __post_init__(self) -> None:
        for name, least in (("prelude", 0), ("core", 1), ("coda", 0)):
            n = getattr(self, name)
            must(isinstance(n, int) and n >= least, f"{name}={n!r}; use a whole number of at least {least}")

    def layers(self, n_layers: int) -> tuple[range, range, range]:
        """The original's layers, counted from 0, that become prelude, core and coda.

        Raises:
            ValueError: if the original has too few.
        """
        wanted = self.prelude + self.core + self.coda
        must(
            wanted <= n_layers,
            f"prelude={self.prelude}, core={self.core} and coda={self.coda} are {wanted} layers, but the original has "
            f"{n_layers}; use at most {n_layers}",
        )
        end = n_layers - self.coda
        return range(self.prelude), range(end - self.core, end), range(end, n_layers)


def retrofit(original: Any, split: Split, loops: int = 4, decay: float = 0.5) -> OpenMythos:
    """Build a recurrent-depth model from the layers of a pretrained one.

    Args:
        original: a Llama of transformers.
        split: number of layers of each part.
        loops: default number of loops.
        decay: A, the weight of the state in a loop's input; the encoded input has weight ``1 - decay``.

    Returns:
        The model, float32, in eval mode. It does not halt; its loops beyond the first have yet to be trained.

    Raises:
        ValueError: for an unsupported architecture, adapters, quantised layers, or a split that does not fit.
    """
    check_family(original.config)
    must(
        hasattr(original, "model") and hasattr(original.model, "layers"),
        f"the original is a {type(original).__name__}; give the model itself, after merge_and_unload() if it is PEFT's",
    )
    parts = split.layers(len(original.model.layers))
    # A config may say tied of a file that has both; transformers then does not tie them.
    is_tied = original.lm_head.weight is original.model.embed_tokens.weight
    config, rope = original.config, dict(original.config.rope_parameters)
    stretch = {}
    if rope.get("rope_type") == "llama3":
        stretch = dict(rope_factor=rope["factor"], rope_context=rope["original_max_position_embeddings"])
    cfg = MythosConfig(
        vocab_size=config.vocab_size, dim=config.hidden_size, n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads, max_seq_len=config.max_position_embeddings, max_loop_iters=loops,
        prelude_layers=split.prelude, core_layers=split.core, coda_layers=split.coda,
        attn_type="gqa", rope_theta=rope["rope_theta"], norm_eps=config.rms_norm_eps, **stretch,
        n_experts=0, dense_dim=config.intermediate_size, tied_head=is_tied,
        injection_decay=decay, injection_gain=1 - decay, input_norm=False, state_norm=False, state_init="input",
        lora_rank=0, conv_taps=0, local_window=0, halting=False, warm_start=False,
    )  # fmt: skip
    model = OpenMythos(cfg)
    blocks = *model.prelude, *model.recurrent.layers, *model.coda
    with torch.no_grad():
        # Embeddings are multiplied by sqrt(dim) here, so they are divided; with a tied head, the last norm undoes that.
        root = cfg.dim**0.5
        model.embed.weight.copy_(original.model.embed_tokens.weight / root)
        model.norm.weight.copy_(original.model.norm.weight * (root if cfg.tied_head else 1.0))
        if not cfg.tied_head:
            model.head.weight.copy_(original.lm_head.weight)
        for block, i in zip(blocks, (i for part in parts for i in part), strict=True):
            _copy_layer(block, original.model.layers[i])
    return model.eval()


def _copy_layer(block: Any, layer: Any) -> None:
    attn, ffn, old_attn, old_ffn = block.attn, block.ffn, layer.self_attn, layer.mlp
    block.attn_norm.weight.copy_(layer.input_layernorm.weight)
    block.ffn_norm.weight.copy_(layer.post_attention_layernorm.weight)
    for linear, old in (
        (attn.wq, old_attn.q_proj), (attn.wk, old_attn.k_proj), (attn.wv, old_attn.v_proj), (attn.wo, old_attn.o_proj),
        (ffn.gate, old_ffn.gate_proj), (ffn.up, old_ffn.up_proj), (ffn.down, old_ffn.down_proj),
    ):  # fmt: skip
        must(
            type(old) is nn.Linear,
            f"a layer of the original is a {type(old).__name__}, not a plain Linear; merge its adapters "
            f"(merge_and_unload), or load it unquantised",
        )
        weight = old.weight
        if linear in (attn.wq, attn.wk):  # RoPE rotates channels i and D/2 + i in the original, 2i and 2i + 1 here
            weight = weight.unflatten(0, (-1, 2, attn.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        linear.weight.copy_(weight / linear.scale)


def truncate(original: Any, split: Split) -> None:
    """Remove the layers from ``original`` that ``split`` drops, so that the new model at one loop equals it."""
    layers = original.model.layers
    kept = [layers[i] for part in split.layers(len(layers)) for i in part]
    original.model.layers, original.config.num_hidden_layers = nn.ModuleList(kept), len(kept)


@torch.no_grad()
def logits_of(original: Any, ids: Tensor) -> Tensor:
    """The original's logits (B, T, vocab_size) for tokens (B, T)."""
    return original(input_ids=ids, use_cache=False).logits


def difference(model: OpenMythos, logits: Tensor, ids: Tensor) -> float:
    """Largest difference between the model's logits at one loop and ``logits``, in the units of :data:`TOLERANCE`."""
    with torch.no_grad():
        apart = (model(ids, n_loops=1) - logits).abs().max()
    return float(apart / logits.abs().max().clamp(min=1))


def save(model: OpenMythos, tokenizer: Any, directory: str | Path, generation: Any = None) -> None:
    """Write the model, its tokenizer, and a generation config with the special tokens, in place of an earlier model's.

    End tokens are those of ``generation``, the original's generation config, and of the tokenizer; other special tokens
    are the tokenizer's where ``generation`` has none.
    """
    from transformers import GenerationConfig

    names = ("bos_token_id", "pad_token_id", "eos_token_id")
    given = {name: getattr(generation, name, None) for name in names}
    made = {name: getattr(tokenizer, name) if given[name] is None else given[name] for name in names}
    ends = made["eos_token_id"] if isinstance(made["eos_token_id"], list) else [made["eos_token_id"]]
    ends = [end for end in dict.fromkeys([*ends, tokenizer.eos_token_id]) if end is not None]
    made["eos_token_id"] = ends if len(ends) > 1 else next(iter(ends), None)
    with files.replacing_folder(directory) as partial:
        # Several templates would be files of a subfolder; so they are in the tokenizer's config.
        tokenizer.save_pretrained(partial, save_jinja_files=isinstance(tokenizer.chat_template, str | None))
        GenerationConfig(**made).save_pretrained(partial)
        model.save_pretrained(partial)
        written = {file.name for file in partial.iterdir()}
    remove_earlier(Path(directory), written)
    remove_beside(Path(directory), written)
