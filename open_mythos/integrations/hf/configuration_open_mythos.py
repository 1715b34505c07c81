"""The model's config as a transformers config."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Self

from transformers import PreTrainedConfig

from open_mythos import files
from open_mythos.config import FORMAT_VERSION, MODEL_TYPE, MythosConfig, model_fields

_FOR_PEFT = ("hidden_size", "num_attention_heads")  # aliases that PEFT reads from `to_dict`
# Arguments that transformers' own config takes besides its fields
_ARGUMENTS = {"attn_implementation", "experts_implementation", "name_or_path", "per_layer_config", "use_return_dict"}


class OpenMythosConfig(PreTrainedConfig):
    """Every field of :class:`~open_mythos.MythosConfig`, under its own name, and the fields that transformers needs.

    Usual names are aliases: ``hidden_size`` is ``dim``, ``num_attention_heads`` is ``n_heads``, and so on.

    Args:
        num_loops: default number of loops; the same as ``max_loop_iters``, and not a limit.
        lora_loops: rows of the depth-wise LoRA table, which do not change with ``num_loops``; ``max_loop_iters``
            if None.
        use_cache: whether a call in eval mode returns a cache by default.

    Raises:
        ValueError: for a field or combination that :class:`~open_mythos.MythosConfig` refuses, an unknown field, a
            config of another kind of model, or one that a newer version wrote.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar = ["cache", "past_key_values"]
    attribute_map: ClassVar = {
        "hidden_size": "dim",
        "max_position_embeddings": "max_seq_len",
        "moe_intermediate_size": "expert_dim",
        "num_attention_heads": "n_heads",
        "num_experts": "n_experts",
        "num_experts_per_tok": "n_experts_per_tok",
        "num_key_value_heads": "n_kv_heads",
        "num_loops": "max_loop_iters",
    }
    write_code: ClassVar[Any] = None  # function that writes the source beside a saved config; None in remote code

    use_cache: bool = True
    tie_word_embeddings: bool = True
    lora_loops: int | None = None
    auto_map: dict[str, str] = dataclasses.field(default_factory=dict)  # TRL reads it
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **others: Any) -> None:
        num_loops = others.pop("num_loops", None)
        given = {self.attribute_map.get(name, name): value for name, value in others.items()}
        own = {field.name for field in dataclasses.fields(OpenMythosConfig)}
        values = model_fields(given, frozenset(own | _ARGUMENTS | {name for name in given if name.startswith("_")}))
        cfg = MythosConfig(**values)
        if self.lora_loops is None:
            self.lora_loops = cfg.max_loop_iters
        for name, value in cfg.to_dict().items():
            setattr(self, name, value)
        if num_loops is not None:
            self.num_loops = num_loops
        self.format_version = FORMAT_VERSION
        self.tie_word_embeddings = cfg.tied_head
        ours = values.keys() | {"model_type", "format_version", "tie_word_embeddings"}
        super().__post_init__(**{name: value for name, value in given.items() if name not in ours})

    @classmethod
    def from_mythos(cls, cfg: MythosConfig, **others: Any) -> Self:
        """Build from a :class:`MythosConfig`; ``others`` are fields of transformers, such as ``eos_token_id``."""
        return cls(**cfg.to_dict(), **others)

    def mythos(self) -> MythosConfig:
        """The :class:`MythosConfig` of the fields, validated again.

        Raises:
            ValueError: if a field has been set to an invalid value.
        """
        return MythosConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(MythosConfig)})

    # -- what tools need

    @property
    def num_hidden_layers(self) -> int:
        """Layers that write keys and values in a call with ``num_loops`` loops."""
        return self.prelude_layers + self.coda_layers + getattr(self, "core_layers", 1) * self.num_loops

    @property
    def head_dim(self) -> int:
        """Channels of one head's keys."""
        return self.mythos().head_dim

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, with the aliases that PEFT's prompt tuning looks for."""
        return {name: getattr(self, name) for name in _FOR_PEFT} | super().to_dict()  # where both are read, ours count

    def to_diff_dict(self) -> dict[str, Any]:
        """As in transformers: what is saved, without aliases."""
        return {name: value for name, value in super().to_diff_dict().items() if name not in _FOR_PEFT}

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As in transformers, but whole or not at all; with ``register_for_auto_class``, the source is saved too."""
        if push_to_hub:
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with files.replacing_folder(save_directory) as partial:
            super().save_pretrained(partial, push_to_hub, **kwargs)
            if self._auto_class is not None and self.write_code is not None:
                type(self).write_code(partial)
