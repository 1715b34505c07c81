"""MythosConfig: every number that shapes a model, checked when it is made. Imports no torch."""

import math
from dataclasses import dataclass, fields
from typing import Any, Self

from open_mythos.fields import Checked, choice, flag, must, nearest, real, size
from open_mythos.install import UPDATE

MODEL_TYPE = "open_mythos"
FORMAT_VERSION = 1
"""Version of saved configs, raised when an old reader would misread a new file."""

# Fields that transformers adds to a config.json, which are accepted and ignored.
OF_TRANSFORMERS = {
    "_attn_implementation_autoset", "_name_or_path", "architectures", "auto_map", "bos_token_id",
    "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label", "is_encoder_decoder", "label2id", "lora_loops",
    "num_labels", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "quantization_config",
    "return_dict", "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


@dataclass
class MythosConfig(Checked):
    """Shape and behaviour of an :class:`~open_mythos.OpenMythos` model.

    The first 23 fields are those of the public reference implementation, with its defaults; the rest
    are this library's. Every field is checked at construction, and again by :meth:`validate`.

    Raises:
        ValueError: naming the field, the value that came, and what would do.
    """

    # -- size of the model
    vocab_size: int = size(32000)
    dim: int = size(2048)
    n_heads: int = size(16)
    n_kv_heads: int = size(4)  # attn_type="gqa" only
    max_seq_len: int = size(4096)
    max_loop_iters: int = size(16)  # loops run when n_loops is not given; not a limit
    prelude_layers: int = size(2, minimum=0)
    coda_layers: int = size(2, minimum=0)
    # -- attention
    attn_type: str = choice("mla", "mla", "gqa")
    kv_lora_rank: int = size(512)  # this and the next four: attn_type="mla" only
    q_lora_rank: int = size(1536)
    qk_rope_head_dim: int = size(64)
    qk_nope_head_dim: int = size(128)
    v_head_dim: int = size(128)
    # -- mixture of experts (recurrent block only)
    n_experts: int = size(64, minimum=0)  # 0: a dense feed-forward there too, as in prelude and coda
    n_shared_experts: int = size(2, minimum=0)  # each is expert_dim * n_experts_per_tok wide
    n_experts_per_tok: int = size(4)
    expert_dim: int = size(512)
    # -- the rest of the reference's fields
    act_threshold: float = real(0.99, 0.0, 1.0, low_open=True)  # a position halts when its halting mass reaches this
    rope_theta: float = real(500000.0, 0.0, low_open=True)
    lora_rank: int = size(16, minimum=0)  # 0: no depth-wise LoRA
    max_output_tokens: int = size(4096)  # most new tokens that one generate() call may ask for
    dropout: float = real(0.0, 0.0, 1.0, high_open=True)
    # -- beyond the reference: shape
    core_layers: int = size(1)  # transformer blocks that a loop runs, one after the other
    dense_dim: int = size(0, minimum=0)  # width of dense feed-forwards; 0: 4/3 of dim
    tied_head: bool = flag(True)  # the head is the embedding's matrix; False: it has its own
    norm_eps: float = real(1e-6, 0.0, low_open=True)  # of every RMSNorm
    # -- beyond the reference: what makes depth pay (evidence in dev/LOG.md)
    # "injected": h <- norm(A h + B e + Transformer(A h + B e)), the coda reads the last state; "mixture", as in the
    # public reference: h <- A h + B e + Transformer(norm(h + e)), the coda reads a gate-weighted mean of all states
    recurrence: str = choice("injected", "injected", "mixture")
    # mixing weights of the chosen experts: normalised sigmoids of their logits, or a softmax over their logits
    router_score: str = choice("sigmoid", "sigmoid", "softmax")
    # standard deviation of stored matrices, scaled to 1/sqrt(fan_in) in use: smaller learns faster (muP, 2203.03466)
    weight_std: float = real(0.02, 0.0, low_open=True)
    # initial A and B of the injection (Parcae, 2604.12946)
    injection_decay: float = real(0.7, 0.0, 1.0, low_open=True, high_open=True)
    injection_gain: float = real(0.7, 0.0)
    # hidden width of the adapter through which pretrained layers read what earlier loops have changed; 0: none
    bridge_dim: int = size(0, minimum=0)
    # RMSNorm on the prelude's output, the encoded input that the loops read; False: no norm
    input_norm: bool = flag(True)
    # RMSNorm on the state after every loop (2604.15259)
    state_norm: bool = flag(True)
    # the first state: the encoded input, zeros, or noise in training and zeros in eval mode (Huginn, 2502.05171)
    state_init: str = choice("input", "input", "zero", "noise")
    # in training, one row in eight starts from its own state after some loops, computed without gradient (2202.05826):
    # the block learns to keep and extend a partial solution, however many loops are trained
    warm_start: bool = flag(True)
    # standard deviation of noise added to the state after every loop in training; steadies a model that drifts at depth
    state_noise: float = real(0.0, 0.0)
    # rotary wavelengths beyond rope_context tokens are stretched by this factor, to extend the context (Llama 3.1,
    # 2407.21783); 1: none are, and rope_context is not used
    rope_factor: float = real(1.0, 1.0)
    rope_context: int = size(8192)
    # kernel size of a causal convolution on attention's keys and values; 0: none (Canon layers, Allen-Zhu 2025)
    conv_taps: int = size(3, minimum=0)
    # local heads of the recurrent block see only this many most recent tokens; 0: all heads see all tokens
    local_window: int = size(6, minimum=0)
    # a token sees itself and earlier ones; False: later ones as well, for puzzles and encoders
    causal: bool = flag(True)
    # share of the recurrent block's heads that are local; below 1, at least one head sees all tokens. 1: none does, and
    # what a position computes depends on its neighbours alone, at any length
    local_share: float = real(0.75, 0.0, 1.0)
    # channels that encode the loop number; 0: none, since it ties a model to its trained depth; if odd, the last cosine
    # is left out
    loop_index_dim: int = size(0, minimum=0)
    # -- beyond the reference: control
    # in eval mode, skip positions that the gate has halted; False: every position runs every loop, no gate is trained
    halting: bool = flag(True)
    # a state counts as converged, in the gate's targets, within this relative distance of its final value
    halting_tolerance: float = real(0.1, 0.0, low_open=True)
    # step size of the router bias in load balancing (DeepSeek-V3, 2412.19437)
    router_bias_rate: float = real(0.01, 0.0)

    # -- checks

    def validate(self) -> None:
        """Check every field and combination. Call it after changing a field by hand.

        Raises:
            ValueError: on the first field that does not hold.
        """
        super().validate()
        must(
            self.dim % self.n_heads == 0,
            f"dim={self.dim} is not divisible by n_heads={self.n_heads}; "
            f"use a multiple of {self.n_heads} for dim, or a divisor of {self.dim} for n_heads",
        )
        must(
            self.n_heads % self.n_kv_heads == 0,
            f"n_kv_heads={self.n_kv_heads} does not divide n_heads={self.n_heads}; "
            f"use one of {_divisors(self.n_heads)}",
        )
        if self.attn_type == "gqa":
            must(
                self.head_dim % 2 == 0,
                f"dim={self.dim} / n_heads={self.n_heads} gives a head size of {self.head_dim}, but rotary embedding "
                f"needs an even one; change dim or n_heads",
            )
        else:
            must(
                self.qk_rope_head_dim % 2 == 0,
                f"qk_rope_head_dim={self.qk_rope_head_dim} is odd, but rotary embedding rotates pairs of channels; "
                f"use {self.qk_rope_head_dim + 1} or another even size",
            )
        must(
            self.n_experts_per_tok <= self.n_experts or self.n_experts == 0,
            f"n_experts_per_tok={self.n_experts_per_tok} is more than n_experts={self.n_experts}; "
            f"use 1 to {self.n_experts}",
        )
        must(
            self.loop_index_dim <= self.dim,
            f"loop_index_dim={self.loop_index_dim} is more than dim={self.dim}; use at most dim, or 0 for none",
        )
        if self.recurrence == "mixture":
            self._check_mixture()

    def _check_mixture(self) -> None:
        must(
            not self.warm_start,
            "warm_start=True starts training from deeper states, whose mixture is made; use warm_start=False with "
            "recurrence='mixture'",
        )
        must(
            self.state_noise == 0 and self.state_init != "noise",
            f"state_noise={self.state_noise:g} and state_init={self.state_init!r}, but recurrence='mixture' adds no "
            f"noise to its states; use state_noise=0, and state_init='input' or 'zero'",
        )
        must(
            self.bridge_dim == 0,
            f"bridge_dim={self.bridge_dim}, but recurrence='mixture' has no bridge between its loops; use bridge_dim=0",
        )

    # -- files

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build from plain values, as :meth:`Checked.from_dict`, or from what a ``config.json`` holds.

        Raises:
            ValueError: for another kind of model, for what a newer version wrote, or as :meth:`Checked.from_dict`.
        """
        return super().from_dict(model_fields(data))

    # -- derived sizes

    @property
    def max_text_len(self) -> int:
        """Most tokens of a prompt and its continuation together: the last new token is not read by the model."""
        return self.max_seq_len + 1

    @property
    def head_dim(self) -> int:
        """Channels of one GQA head."""
        return self.dim // self.n_heads

    @property
    def rope_dim(self) -> int:
        """Channels that rotary embedding rotates, per head."""
        return self.head_dim if self.attn_type == "gqa" else self.qk_rope_head_dim

    @property
    def rope(self) -> tuple[int, float, float, int]:
        """Arguments of :func:`open_mythos.ops.rope.rope_frequencies`: dim, theta, factor, context."""
        return self.rope_dim, self.rope_theta, self.rope_factor, self.rope_context

    @property
    def n_local_heads(self) -> int:
        """How many heads of the recurrent block, the first ones, see only the last ``local_window`` tokens."""
        if self.local_window == 0:
            return 0
        n_local = math.ceil(round(self.n_heads * self.local_share, 6))  # 20 heads at .9 are 18.000000000000004
        return n_local if self.local_share == 1 else min(n_local, self.n_heads - 1)

    @property
    def ffn_dim(self) -> int:
        """Width of the dense feed-forward in prelude and coda, and in the recurrent block if it has no experts."""
        return self.dense_dim or self.dim * 4 // 3

    @property
    def shared_dim(self) -> int:
        """Width of all shared experts together."""
        return self.n_shared_experts * self.n_experts_per_tok * self.expert_dim


def model_fields(data: dict[str, Any], also: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The :class:`MythosConfig` fields in the content of a ``config.json``.

    Args:
        data: its content.
        also: names to ignore, besides those that transformers writes.

    Raises:
        ValueError: for another kind of model, a newer format, or a name that is neither a field nor ignored.
    """
    kind, version = data.get("model_type", MODEL_TYPE), data.get("format_version", FORMAT_VERSION)
    must(
        kind == MODEL_TYPE,
        f"model_type={kind!r} is another kind of model, not {MODEL_TYPE!r}; load it with transformers' "
        f"AutoModelForCausalLM, or convert a Llama to a recurrent-depth model with mythos retrofit",
    )
    must(
        isinstance(version, int) and version <= FORMAT_VERSION,
        f"format_version={version!r}: this config was written by a newer open_mythos, and this one reads only up to "
        f"{FORMAT_VERSION}; {UPDATE}",
    )
    known = [field.name for field in fields(MythosConfig)]
    found = {name: value for name, value in data.items() if name not in ("model_type", "format_version")}
    for name in found:
        if name not in known and name not in OF_TRANSFORMERS and name not in also:
            raise ValueError(
                f"unknown config field {name!r}; {nearest(name, known)} (if a newer open_mythos wrote this config, "
                f"{UPDATE})"
            )
    return {name: value for name, value in found.items() if name in known}


def _divisors(n: int) -> list[int]:
    """Divisors of ``n`` up to 1024: ``n`` may come from a file and be huge."""
    return [d for d in range(1, min(n, 1024) + 1) if n % d == 0]
