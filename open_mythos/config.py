"""MythosConfig: every number that shapes a model, checked when it is made. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def _size(default: int, minimum: int = 1) -> Any:
    return field(default=default, metadata={"kind": int, "min": minimum})


def _real(
    default: float, low: float, high: float | None = None, *, low_open: bool = False, high_open: bool = False
) -> Any:
    meta = {"kind": float, "low": low, "high": high, "low_open": low_open, "high_open": high_open}
    return field(default=default, metadata=meta)


def _choice(default: str, *options: str) -> Any:
    return field(default=default, metadata={"kind": str, "options": options})


def _flag(default: bool) -> Any:
    return field(default=default, metadata={"kind": bool})


@dataclass
class MythosConfig:
    """Shape and behaviour of an :class:`~open_mythos.OpenMythos` model.

    The first 23 fields are those of the public reference implementation, with its defaults; the rest
    are this library's. Every field is checked at construction, and again by :meth:`validate`.

    Raises:
        ValueError: naming the field, the value that came, and what would do.
    """

    # -- size of the model
    vocab_size: int = _size(32000)
    dim: int = _size(2048)
    n_heads: int = _size(16)
    n_kv_heads: int = _size(4)  # attn_type="gqa" only
    max_seq_len: int = _size(4096)
    max_loop_iters: int = _size(16)  # loops run when n_loops is not given; not a limit
    prelude_layers: int = _size(2, minimum=0)
    coda_layers: int = _size(2, minimum=0)
    # -- attention
    attn_type: str = _choice("mla", "mla", "gqa")
    kv_lora_rank: int = _size(512)  # this and the next four: attn_type="mla" only
    q_lora_rank: int = _size(1536)
    qk_rope_head_dim: int = _size(64)
    qk_nope_head_dim: int = _size(128)
    v_head_dim: int = _size(128)
    # -- mixture of experts (recurrent block only)
    n_experts: int = _size(64)
    n_shared_experts: int = _size(2, minimum=0)  # each is expert_dim * n_experts_per_tok wide
    n_experts_per_tok: int = _size(4)
    expert_dim: int = _size(512)
    # -- the rest of the reference's fields
    act_threshold: float = _real(0.99, 0.0, 1.0, low_open=True)  # a position halts when its halting mass reaches this
    rope_theta: float = _real(500000.0, 0.0, low_open=True)
    lora_rank: int = _size(16, minimum=0)  # 0: no depth-wise LoRA
    max_output_tokens: int = _size(4096)  # most new tokens that one generate() call may ask for
    dropout: float = _real(0.0, 0.0, 1.0, high_open=True)
    # -- beyond the reference: what makes depth pay (evidence in dev/LOG.md)
    # standard deviation at which matrices are stored; used at 1/sqrt(fan_in), so less learns faster (muP, 2203.03466)
    weight_std: float = _real(0.02, 0.0, low_open=True)
    # initial A and B of the injection (Parcae, 2604.12946)
    injection_decay: float = _real(0.7, 0.0, 1.0, low_open=True, high_open=True)
    injection_gain: float = _real(0.7, 0.0)
    # RMSNorm on the state after every loop (2604.15259)
    state_norm: bool = _flag(True)
    # the first state: the encoded input, zeros, or noise in training and zeros in eval mode (Huginn, 2502.05171)
    state_init: str = _choice("input", "input", "zero", "noise")
    # in training, one row in eight starts from a deeper state of its own, reached without gradient (2202.05826): the
    # block learns to keep and extend what is solved, whatever the number of loops that are trained
    warm_start: bool = _flag(True)
    # standard deviation of noise on the state after every loop of training; steadies a model that drifts at depth
    state_noise: float = _real(0.0, 0.0)
    # tokens that a causal convolution on attention's keys and values sees; 0: none (Canon layers, Allen-Zhu 2025)
    conv_taps: int = _size(3, minimum=0)
    # three in four heads of the recurrent block see this many last tokens only; 0: all heads see all tokens
    local_window: int = _size(6, minimum=0)
    # channels that carry the loop number; 0: none, since it ties a model to the depth of its training
    loop_index_dim: int = _size(0, minimum=0)
    # -- beyond the reference: control
    # in eval mode, skip positions whose gate has closed; False: every loop for every position, and no gate is trained
    halting: bool = _flag(True)
    # relative distance from where it ends at which the gate should call a state settled
    halting_tolerance: float = _real(0.1, 0.0, low_open=True)
    # step of the router's load balancing (DeepSeek-V3, 2412.19437)
    router_bias_rate: float = _real(0.01, 0.0)

    def __post_init__(self) -> None:
        self.validate()

    # -- checks

    def validate(self) -> None:
        """Check every field and combination. Call it after changing a field by hand.

        Raises:
            ValueError: on the first field that does not hold.
        """
        for spec in dataclasses.fields(self):
            setattr(self, spec.name, _checked(spec.name, getattr(self, spec.name), spec.metadata))
        _must(
            self.dim % self.n_heads == 0,
            f"dim={self.dim} does not divide by n_heads={self.n_heads}; "
            f"use a multiple of {self.n_heads} for dim, or a divisor of {self.dim} for n_heads",
        )
        _must(
            self.n_heads % self.n_kv_heads == 0,
            f"n_kv_heads={self.n_kv_heads} does not divide n_heads={self.n_heads}; "
            f"use one of {_divisors(self.n_heads)}",
        )
        if self.attn_type == "gqa":
            _must(
                self.head_dim % 2 == 0,
                f"dim={self.dim} over n_heads={self.n_heads} gives heads of {self.head_dim}, and rotary embedding "
                f"needs an even head size; change dim or n_heads",
            )
        else:
            _must(
                self.qk_rope_head_dim % 2 == 0,
                f"qk_rope_head_dim={self.qk_rope_head_dim} is odd, and rotary embedding turns pairs of channels; "
                f"use {self.qk_rope_head_dim + 1} or another even size",
            )
        _must(
            self.n_experts_per_tok <= self.n_experts,
            f"n_experts_per_tok={self.n_experts_per_tok} is more than n_experts={self.n_experts}; "
            f"use 1 to {self.n_experts}",
        )
        _must(
            self.loop_index_dim % 2 == 0 and self.loop_index_dim <= self.dim,
            f"loop_index_dim={self.loop_index_dim} must be even, since it holds sines and cosines, and at most "
            f"dim={self.dim}; use 0 for none",
        )

    # -- derived sizes

    @property
    def head_dim(self) -> int:
        """Channels of one GQA head."""
        return self.dim // self.n_heads

    @property
    def rope_dim(self) -> int:
        """Channels that rotary embedding turns, per head."""
        return self.head_dim if self.attn_type == "gqa" else self.qk_rope_head_dim

    @property
    def n_local_heads(self) -> int:
        """Heads of the recurrent block, the first ones, that see the last ``local_window`` tokens only."""
        return self.n_heads - max(1, self.n_heads // 4) if self.local_window else 0

    @property
    def ffn_dim(self) -> int:
        """Width of the dense feed-forward in prelude and coda."""
        return self.dim * 4 // 3

    @property
    def shared_dim(self) -> int:
        """Width of all shared experts together."""
        return self.n_shared_experts * self.n_experts_per_tok * self.expert_dim

    # -- to and from plain data

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain Python values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MythosConfig:
        """Build from plain values; missing fields take their defaults.

        Raises:
            ValueError: for an unknown key (with the nearest known name) or a bad value.
        """
        known = [spec.name for spec in dataclasses.fields(cls)]
        for key in data:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"known fields are {', '.join(known)}"
                raise ValueError(f"unknown config field {key!r}; {hint}")
        return cls(**data)

    def to_json(self) -> str:
        """The config as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> MythosConfig:
        """Build from JSON text, the inverse of :meth:`to_json`.

        Raises:
            ValueError: if the text is not a JSON object, or as :meth:`from_dict`.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"config is not valid JSON: {error}") from error
        if not isinstance(data, dict):
            raise ValueError(f"config must be a JSON object, got {type(data).__name__}")
        return cls.from_dict(data)

    def save(self, path: str | Path) -> None:
        """Write the config as JSON to ``path``."""
        Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> MythosConfig:
        """Read a config that :meth:`save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: naming the file, if its content is not a config.
        """
        try:
            return cls.from_json(Path(path).read_text())
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: {error}") from error


def _must(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _checked(name: str, value: Any, meta: Any) -> Any:
    """``value`` in the field's own type, or a ValueError that says what would do."""
    kind = meta["kind"]
    if kind is bool:
        _must(isinstance(value, bool), f"{name}={value!r} is not a bool; use True or False")
    elif kind is str:
        options = meta["options"]
        _must(value in options, f"{name}={value!r} is unknown; use one of {', '.join(map(repr, options))}")
    elif kind is int:
        least = meta["min"]
        whole = isinstance(value, int) and not isinstance(value, bool)
        _must(whole, f"{name}={value!r} is not a whole number; use an int of at least {least}")
        _must(value >= least, f"{name}={value} is too small; use an int of at least {least}")
    else:
        low, high = meta["low"], meta["high"]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        left = ("(" if meta["low_open"] else "[") + f"{low:g}"
        right = (f"{high:g}" if high is not None else "inf") + (")" if meta["high_open"] or high is None else "]")
        wanted = f"use a number in {left}, {right}"
        _must(number, f"{name}={value!r} is not a number; {wanted}")
        value = float(value)
        above = value > low if meta["low_open"] else value >= low
        below = value < float("inf") if high is None else value < high if meta["high_open"] else value <= high
        _must(above and below, f"{name}={value:g} is out of range; {wanted}")
    return value
