"""Base class of this library's transformers models: a wrapper around :class:`~open_mythos.OpenMythos`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from open_mythos import files
from open_mythos.checkpoint import (
    CONFIG_FILE,
    SHIPPED,
    CheckpointError,
    check_plain,
    is_tied,
    remove_earlier,
    shipped,
    verify_files,
)
from open_mythos.fields import must
from open_mythos.inputs import check_mask
from open_mythos.integrations.hf.cache import SlotCache
from open_mythos.integrations.hf.configuration_open_mythos import OpenMythosConfig
from open_mythos.model import OpenMythos
from open_mythos.nn.feed_forward import MoEFFN
from open_mythos.ops.attention import has_documents

# What transformers calls a cache in arguments and outputs: `cache` from 5.24 on. Models here take both names.
CACHE = ({field.name for field in dataclasses.fields(BaseModelOutputWithPast)} & {"cache", "past_key_values"}).pop()
_TIED = "core.head.weight"  # not stored if tied to the embedding, as in most models
_AUTO_MAP = {
    "AutoConfig": "configuration_open_mythos.OpenMythosConfig",
    "AutoModel": "modeling_open_mythos.OpenMythosModel",
    "AutoModelForCausalLM": "modeling_open_mythos.OpenMythosForCausalLM",
    "AutoModelForSequenceClassification": "modeling_open_mythos.OpenMythosForSequenceClassification",
}
# Arguments that libraries pass to any model, and that change nothing here
_LET_PASS = {"cache_position", "ignore_index", "num_items_in_batch", "shift_labels", "token_type_ids"}
_AS_POSITIONS = {"cu_seq_lens_k", "cu_seq_lens_q", "max_length_k", "max_length_q", "seq_idx"}  # follow from positions
_INSTEAD = {"exit": "model.core(…, exit=…)", "kv_cache": "cache", "n_loops": "num_loops", "start_pos": "position_ids"}
_LIVE = ("max_loop_iters", "max_seq_len", "halting", "act_threshold")  # config fields that may change at any time


class OpenMythosPreTrainedModel(PreTrainedModel):
    """The wrapper: files, embeddings, and the call into the core.

    Args:
        config: shape and behaviour. ``num_loops``, ``max_seq_len``, ``halting`` and ``act_threshold`` may be changed
            there at any time; a call sets them in the core's config too.
        core: the model to wrap; a new one if None.

    Attributes:
        core: the :class:`~open_mythos.OpenMythos`, for everything else that this library does with a model.
    """

    config_class = OpenMythosConfig
    base_model_prefix = "core"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: ClassVar = ["TransformerBlock"]
    _skip_keys_device_placement: ClassVar = ["cache", "past_key_values"]
    _keep_in_fp32_modules_strict: ClassVar = ["router_bias"]
    _tied_weights_keys: dict[str, str] = {_TIED: "core.embed.weight"}  # noqa: RUF012 (another for an untied head)
    without_head: ClassVar[type[PreTrainedModel]]
    write_code: ClassVar[Any] = None  # function that writes the source beside saved weights; None in remote code

    def __init__(self, config: OpenMythosConfig, core: OpenMythos | None = None) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False
        _tell_peft()
        if core is None:
            cfg = config.mythos()
            cfg.max_loop_iters = config.lora_loops or cfg.max_loop_iters
            core = OpenMythos(cfg)
            for module in core.modules():
                if isinstance(module, MoEFFN):  # float32 under another default dtype too
                    module.router_bias = module.router_bias.float()
        self.core = core
        if not core.cfg.tied_head:
            self._tied_weights_keys = {}
        self.training = core.training
        self.post_init()

    @classmethod
    def wrap(cls, core: OpenMythos, **others: Any) -> Self:
        """A model of transformers around ``core``, whose weights it shares; ``others`` are fields of the config."""
        lora = core.recurrent.lora
        others = others if lora is None else {"lora_loops": lora.scale.num_embeddings, **others}
        return cls(OpenMythosConfig.from_mythos(core.cfg, dtype=core.embed.weight.dtype, **others), core)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the core initialises its own weights, and a subclass those that it adds."""

    # -- files

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; also for a folder of this library's ``save_pretrained``, or the name of a shipped model.

        Raises:
            ValueError: for a config or weights of another model, or of a newer version.
            OSError: for a name that is neither here nor, as far as the network tells, on the hub.
        """
        name, wants_info = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        if not Path(name).exists() and str(name) in shipped():
            name = SHIPPED / str(name)
        path = Path(name)
        if not path.exists() and path.is_absolute():
            raise OSError(f"{name} does not exist; give a folder that save_pretrained wrote, or a name on the hub")
        known = any((path / file).is_file() for file in (CONFIG_FILE, "adapter_config.json"))
        if path.is_dir() and not known and not kwargs.keys() & {"config", "subfolder"}:
            raise OSError(f"{name}/{CONFIG_FILE} is missing; download or save it again, or pass config=")
        must(
            not kwargs.get("ignore_mismatched_sizes"),
            "ignore_mismatched_sizes=True would leave tensors without values; load the model as it was saved, and use "
            "model.resize_token_embeddings(n) for another vocabulary",
        )
        if path.is_dir() and not kwargs.keys() & {"subfolder", "gguf_file", "state_dict"}:
            verify_files(OpenMythos, path)
        try:
            model, info = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        except OSError as error:
            if path.exists():
                raise
            raise OSError(
                f"{name} is neither a folder nor a shipped model ({', '.join(shipped())}), and could not be downloaded "
                f"from the Hugging Face Hub; check the name and the network. {error}"
            ) from error
        except SafetensorError as error:
            raise CheckpointError(
                f"the weights in {name} are truncated or not a safetensors file ({error}); download or save them again"
            ) from error
        lacks = set(info["missing_keys"]) - model._tied_weights_keys.keys()
        missing = sorted(key for key in lacks if key.startswith("core."))
        of_adapter = getattr(model, "_hf_peft_config_loaded", False)  # then `info` is of the adapter
        if missing and not of_adapter and kwargs.get("state_dict") is None and not kwargs.get("gguf_file"):
            raise ValueError(
                f"{name} is not a checkpoint of an open_mythos model: it lacks {len(missing)} tensors such as "
                f"{missing[0]!r}; load it with the class that wrote it, or save it again"
            )
        model._notice_untied()  # for old files whose config says tied and whose weights are not
        return (model, info) if wants_info else model

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in transformers. The folder is also one for :meth:`OpenMythos.from_pretrained`.

        With ``register_for_auto_class``, the model's source is saved too, for machines without this package. Files are
        written to a temporary folder and moved to their places when all are complete, except with
        ``distributed_checkpoint``, where several processes write.

        Raises:
            ValueError: for weights that safetensors cannot hold, such as int8 ones.
            OSError: if the folder cannot be written; it is then as it was.
        """
        if state_dict is None and getattr(self, "hf_quantizer", None) is None:  # a quantizer saves its own format
            check_plain(self)
        self._notice_untied()
        if self._auto_class is not None:  # the saved source has all of these classes
            self.config.auto_map = dict(_AUTO_MAP)
        if hasattr(getattr(self, "generation_config", None), "num_loops"):
            self.generation_config._from_model_config = False  # else num_loops would not be read again
        writes = getattr(self, "should_save_on_this_rank", bool)(is_main_process)
        if not writes or kwargs.get("distributed_checkpoint"):
            super().save_pretrained(save_directory, is_main_process, state_dict, push_to_hub, **kwargs)
            return
        if push_to_hub:
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with files.replacing_folder(save_directory) as partial:
            try:
                super().save_pretrained(partial, is_main_process, state_dict, push_to_hub, **kwargs)
            except SafetensorError as error:  # raised when the disk is full
                raise OSError(str(error)) from error
            if self._auto_class is not None and self.write_code is not None:
                type(self).write_code(partial)
            made = {file.name for file in partial.iterdir()}
        remove_earlier(Path(save_directory), made)

    # -- what tools need

    @property
    def base_model(self) -> nn.Module:
        """The model without its head, which shares the core's weights."""
        is_made = "core" in self._modules  # transformers reads this before the core is made
        return self if not is_made or isinstance(self, self.without_head) else self.without_head(self.config, self.core)

    def get_input_embeddings(self) -> nn.Module:
        return self.core.embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.core.embed, self.core.cfg.vocab_size = value, value.num_embeddings
        if self.core.cfg.tied_head:
            self.core.head.weight, self.core.head.out_features = value.weight, value.num_embeddings

    def _notice_untied(self) -> None:
        """Mark the configs as untied if the head is no longer the embedding's tensor, as after a merge by PEFT."""
        if isinstance(self.core.head, nn.Linear) and self.core.cfg.tied_head and not is_tied(self.core):
            self.core.cfg.tied_head = self.config.tied_head = self.config.tie_word_embeddings = False
            self._tied_weights_keys = {}

    # -- forward pass

    def run(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        others: dict[str, Any],
        last: int | None = None,
        auxiliary: bool = False,
        **options: Any,
    ) -> BaseModelOutputWithPast:
        """Run the core without the head; ``last``, if given, limits the last hidden state to this many last positions.

        ``others`` are checked to be harmless. ``options`` are ``cache``, ``past_key_values``, ``use_cache``,
        ``num_loops`` and ``output_…``. All arguments are those of :meth:`OpenMythosForCausalLM.forward`.
        """
        config, core = self.config, self.core
        cache, past_key_values = options["cache"], options["past_key_values"]
        must((input_ids is None) != (inputs_embeds is None), "give either input_ids or inputs_embeds, and not both")
        attentions = options["output_attentions"] or config.output_attentions
        must(not attentions, "output_attentions=True, but attention weights are never computed here; leave it out")
        given_once = cache is None or past_key_values is None
        must(given_once, "cache and past_key_values are two names of one argument; pass only one of them")
        _check_others(others, position_ids is not None)
        cache = past_key_values if cache is None else cache
        _check_tensors(input_ids, inputs_embeds, attention_mask, position_ids)
        for name in _LIVE:
            setattr(core.cfg, name, getattr(config, name))
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        assert tokens is not None
        if cache is None:
            attention_mask = _numbered(attention_mask, position_ids, tokens)
            packed = has_documents(attention_mask)
            wanted = config.use_cache and not packed if options["use_cache"] is None else options["use_cache"]
            if wanted and not self.training:
                must(not packed, "a cache cannot hold several documents in one row; pass use_cache=False")
                cache = DynamicCache()
        slots = None if cache is None else SlotCache(cache)
        past = 0 if slots is None else slots.length
        if input_ids is not None and (past == 0 or input_ids.device.type == "cpu"):  # on a GPU, the check makes it wait
            highest, n_known = int(input_ids.max()) if input_ids.numel() else 0, core.cfg.vocab_size
            must(
                highest < n_known,
                f"input_ids holds {highest}, but the vocabulary has {n_known} tokens: the tokenizer is "
                f"not this model's. Use the one saved with it, or model.resize_token_embeddings(len(tokenizer))",
            )
        if slots is not None and past and attention_mask is not None and attention_mask.shape[-1] > past:
            slots.valid = attention_mask[:, :past].bool()
        n_loops, with_states = (
            getattr(config, name) if options[name] is None else options[name]
            for name in ("num_loops", "output_hidden_states")
        )
        seen: list[Tensor] | None = [] if with_states else None
        h, ctx = core.states(
            tokens, n_loops, slots, attention_mask=attention_mask, positions=position_ids, seen=seen,
            auxiliary=auxiliary, recompute=self.gradient_checkpointing,
        )  # fmt: skip
        if seen is not None:  # if all positions halted early, their last states are repeated
            seen += seen[-1:] * (n_loops + 1 - len(seen))
            seen = [core.recurrent.output(state) for state in seen]
        return BaseModelOutputWithPast(
            last_hidden_state=core.decode(h, ctx, last=last),
            hidden_states=None if seen is None else tuple(seen),
            **{CACHE: cache},
        )


def _tell_peft() -> None:
    """Add our names to PEFT's list of embedding layers: it ties adapters (``ensure_weight_tying``) of these only."""
    names = getattr(sys.modules.get("peft.utils.constants"), "EMBEDDING_LAYER_NAMES", [])
    names += [name for name in ("embed", "head") if name not in names]


def _check_tensors(ids: Any, embeds: Any, mask: Any, positions: Any) -> None:
    """ValueError for arguments that are no tensors, or positions of another shape than the tokens."""
    name, tokens = ("input_ids", ids) if embeds is None else ("inputs_embeds", embeds)
    must(isinstance(tokens, Tensor), f"{name} is a {type(tokens).__name__}; pass a tensor")
    if mask is not None:
        check_mask(mask)
    if positions is not None:
        must(isinstance(positions, Tensor), f"position_ids is a {type(positions).__name__}; pass a tensor")
        wanted = tuple(tokens.shape[:2])
        fits = len(wanted) < 2 or positions.shape in (wanted, (1, *wanted[1:]))  # the core refuses other tokens
        must(fits, f"position_ids has shape {tuple(positions.shape)}; use {wanted} or {(1, *wanted[1:])}")


def _check_others(others: dict[str, Any], has_positions: bool) -> None:
    """ValueError for arguments that other models use and that would be ignored here."""
    for name, value in others.items():
        says_nothing = value is None or name in _LET_PASS or (name.startswith("output_") and value is False)
        if says_nothing or (has_positions and name in _AS_POSITIONS):
            continue
        instead = "position_ids, which start again with each document" if name in _AS_POSITIONS else _INSTEAD.get(name)
        hint = "leave it out" if instead is None else f"use {instead}"
        raise ValueError(f"there is no argument {name} here; {hint}")


def _numbered(mask: Tensor | None, positions: Tensor | None, tokens: Tensor) -> Tensor | None:
    """``mask``, or (B, T) document numbers if the ``positions`` of real tokens start again within a row."""
    if positions is None or positions.shape[-1] < 2 or (mask is not None and mask.shape != tokens.shape[:2]):
        return mask
    real = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask.bool()
    again = F.pad(positions[:, 1:] <= positions[:, :-1], (1, 0), value=False) & real & real.roll(1, 1)
    if not bool(again.any()) or has_documents(mask):
        return mask
    return (1 + again.cumsum(1)) * real
