"""What ``mythos bench`` times: a model, and where it runs."""

import torch

from open_mythos.cli.info import find_config
from open_mythos.config import MythosConfig
from open_mythos.model import OpenMythos
from open_mythos.models import load_model, model_dir

_HEAD, _VOCABULARY = 64, 8192  # of the shapes that --dim makes


def build(model: str | None, dim: int | None, attn: str | None, experts: int | None, loops: int | None) -> OpenMythos:
    """The model to time, with every position running every loop.

    Raises:
        ValueError: for a model and a shape at once, or either that does not do.
    """
    shape = {"--dim": dim, "--attn": attn, "--experts": experts}
    if model is None:
        made = OpenMythos(shaped(dim or 512, attn or "gqa", experts or 8, loops or 4))
    else:
        if given := [option for option, value in shape.items() if value is not None]:
            raise ValueError(f"{model} has a shape of its own; leave out {' and '.join(given)}, or the model")
        made = saved_or_new(model)
    made.cfg.halting = False
    made.cfg.max_loop_iters = loops or made.cfg.max_loop_iters  # what training explores, too
    return made


def chosen_device(name: str | None) -> torch.device:
    """``name``, or CUDA if there is any, or the CPU. ValueError for what this machine does not have."""
    here = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    if name not in (None, *here):
        raise ValueError(f"--device {name!r} is not to be had here; use {' or '.join(here)}")
    return torch.device(name or here[0])


def saved_or_new(name: str) -> OpenMythos:
    """A saved model, or one of a variant's or a file's config, with random weights."""
    try:
        model_dir(name)
    except ValueError:
        return OpenMythos(find_config(name))
    return load_model(name)


def shaped(dim: int, attn: str, experts: int, loops: int) -> MythosConfig:
    """A model of a width, other sizes in proportion: heads of 64, experts as wide as the model, two for each token."""
    if dim % _HEAD:
        raise ValueError(f"--dim {dim} is no multiple of {_HEAD}, the width of a head; use {dim // _HEAD * _HEAD}")
    heads = dim // _HEAD
    return MythosConfig(
        vocab_size=_VOCABULARY, dim=dim, n_heads=heads, n_kv_heads=heads // 2 if heads % 2 == 0 else heads,
        max_loop_iters=loops, prelude_layers=1, coda_layers=1, attn_type=attn,
        kv_lora_rank=dim // 4, q_lora_rank=dim // 2, qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=_HEAD,
        n_experts=experts, n_shared_experts=1, n_experts_per_tok=min(2, experts), expert_dim=dim,
    )  # fmt: skip
