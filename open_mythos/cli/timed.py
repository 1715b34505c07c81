"""The model that ``mythos bench`` times."""

from open_mythos.cli.info import find_config
from open_mythos.config import MythosConfig
from open_mythos.fields import must
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
        given = [option for option, value in shape.items() if value is not None]
        must(not given, f"{model} has a shape of its own; leave out {' and '.join(given)}, or the model")
        try:
            model_dir(model)
        except ValueError:  # a variant, or a file's config: random weights
            made = OpenMythos(find_config(model))
        else:
            made = load_model(model)
    made.cfg.halting = False
    made.cfg.max_loop_iters = loops or made.cfg.max_loop_iters  # what training explores, too
    return made


def shaped(dim: int, attn: str, experts: int, loops: int) -> MythosConfig:
    """A model of a width, other sizes in proportion: heads of 64, experts as wide as the model, two for each token."""
    heads = dim // _HEAD
    must(dim % _HEAD == 0, f"--dim {dim} is no multiple of {_HEAD}, the width of a head; use {heads * _HEAD}")
    return MythosConfig(
        vocab_size=_VOCABULARY, dim=dim, n_heads=heads, n_kv_heads=heads // 2 if heads % 2 == 0 else heads,
        max_loop_iters=loops, prelude_layers=1, coda_layers=1, attn_type=attn,
        kv_lora_rank=dim // 4, q_lora_rank=dim // 2, qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=_HEAD,
        n_experts=experts, n_shared_experts=1, n_experts_per_tok=min(2, experts), expert_dim=dim,
    )  # fmt: skip
