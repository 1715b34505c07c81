"""The models that the ``Auto`` classes of transformers return."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.models.auto import modeling_auto
from transformers.utils import can_return_tuple

from open_mythos.config import MODEL_TYPE
from open_mythos.fields import must
from open_mythos.integrations.hf.base import CACHE, OpenMythosPreTrainedModel
from open_mythos.ops.dispatch import has_values


class OpenMythosModel(OpenMythosPreTrainedModel):
    """The model without its head, for ``AutoModel``."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        num_loops: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The last hidden states, (B, T, dim); arguments as :meth:`OpenMythosForCausalLM.forward`."""
        return self.run(
            input_ids, inputs_embeds, attention_mask, position_ids, kwargs, cache=cache,
            past_key_values=past_key_values, use_cache=use_cache, num_loops=num_loops,
            output_hidden_states=output_hidden_states, output_attentions=output_attentions,
        )  # fmt: skip


OpenMythosPreTrainedModel.without_head = OpenMythosModel


class OpenMythosForCausalLM(OpenMythosPreTrainedModel, GenerationMixin):
    """The causal language model, for ``AutoModelForCausalLM``."""

    model = OpenMythosPreTrainedModel.base_model  # the name in transformers' language models

    def get_output_embeddings(self) -> nn.Module:
        return self.core.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the head, which is then untied unless it shares the embedding's weight."""
        self.core.head = new_embeddings
        self._notice_untied()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        num_loops: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits for the next token.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T) or, with a cache, (B, past + T), 0 at padding. Without a cache, it may number
                documents packed in a row, 1, 2, …: each gets the logits that it gets alone.
            position_ids: (B or 1, T); counted from each row's first real token if None. Without a cache, a new document
                begins wherever they do not increase, as ``DataCollatorWithFlattening`` and TRL's packing set them.
            past_key_values: the same as ``cache``; its name in transformers before 5.24.
            inputs_embeds: (B, T, dim), in place of ``input_ids``, as ``get_input_embeddings()`` returns them.
            labels: (B, T), -100 at positions without a loss; if given, a loss is returned.
            use_cache: whether to return a cache, in eval mode only; None: as the config says, not for packed documents.
            num_loops: loops to run, any number of at least 1; ``config.num_loops`` if None.
            output_hidden_states: whether to return the state before the first loop and after each one:
                ``num_loops + 1`` tensors (B, T, dim).
            output_attentions: not available.
            logits_to_keep: return only the logits of this many last positions, or of these indices; 0: all.
            cache: a transformers cache of any kind. All calls with one cache must use the same number of loops.
            kwargs: arguments of the loss, such as ``num_items_in_batch``, and those that libraries pass to any model.

        Raises:
            ValueError: for input that does not fit, or an argument that is not known.
        """
        _check_outputs(labels, logits_to_keep, self.config.vocab_size, kwargs.get("ignore_index", -100))
        n_last, some = (None, logits_to_keep) if isinstance(logits_to_keep, Tensor) else (logits_to_keep, slice(None))
        outputs = self.run(
            input_ids, inputs_embeds, attention_mask, position_ids, kwargs, n_last or None, labels is not None,
            cache=cache, past_key_values=past_key_values, use_cache=use_cache, num_loops=num_loops,
            output_hidden_states=output_hidden_states, output_attentions=output_attentions,
        )  # fmt: skip
        logits = self.core.head(outputs.last_hidden_state[:, some])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE: outputs.get(CACHE)}
        )

    # -- generate()

    def _prepare_generation_config(self, generation_config: Any, **kwargs: Any) -> tuple[GenerationConfig, dict]:
        """As in transformers; ``num_loops`` may also be set in a generation config."""
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        num_loops = getattr(generation_config, "num_loops", None)
        return generation_config, model_kwargs if num_loops is None else {"num_loops": num_loops, **model_kwargs}

    def _get_candidate_generator(self, **arguments: Any) -> Any:
        """As in transformers, but ``num_loops`` is not passed on: an assistant model uses its own config's, if any."""
        config = copy.copy(arguments["generation_config"])
        vars(config).pop("num_loops", None)
        kwargs = {name: value for name, value in arguments["model_kwargs"].items() if name != "num_loops"}
        made = super()._get_candidate_generator(**arguments | {"generation_config": config, "model_kwargs": kwargs})
        propose, most = made.get_candidates, config.max_length - 1  # prompt lookup may propose tokens beyond the end

        def within(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            ids, logits = propose(*args, **kwargs)
            return ids[:, :most], logits

        made.get_candidates = within
        return made

    @staticmethod
    def create_masks_for_generate(config: Any, inputs_embeds: Any, attention_mask: Any, **others: Any) -> Any:
        """Return the padding mask as it is: the core needs no other, even with a static cache."""
        return attention_mask

    def _valid_auto_compile_criteria(self, model_kwargs: Any, generation_config: Any) -> bool:
        return False  # shapes change at every token, and with halting


def _check_outputs(labels: Any, logits_to_keep: Any, vocab_size: int, ignored: Any) -> None:
    """ValueError for labels that are no tokens, and for a number of logits that is none."""
    is_number = isinstance(logits_to_keep, int) and logits_to_keep >= 0
    must(
        is_number or isinstance(logits_to_keep, Tensor),
        f"logits_to_keep={logits_to_keep!r}; use a number of last positions, 0 for all, or a tensor of indices",
    )
    if labels is None:
        return
    is_tensor = isinstance(labels, Tensor)
    what = labels.dtype if is_tensor else type(labels).__name__
    must(is_tensor and not labels.is_floating_point(), f"labels are {what}; pass a tensor of token ids")
    if has_values(labels):
        wrong = labels[((labels < 0) & (labels != ignored)) | (labels >= vocab_size)].tolist()
        expected = f"use token ids below {vocab_size}, or {ignored} for no loss"
        must(not wrong, f"labels hold {wrong[0] if wrong else 0}; {expected}")


class OpenMythosForSequenceClassification(OpenMythosPreTrainedModel):
    """One vector of scores for each text, read at its last token; with one label, a reward model."""

    accepts_loss_kwargs = False  # the loss is a mean, which Trainer has to divide by its accumulation steps

    def post_init(self) -> None:  # the score layer is added before it, to be initialised unless it is loaded
        self.score = nn.Linear(self.config.dim, self.config.num_labels, bias=False)
        super().post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if module is self.score:
            nn.init.normal_(module.weight, std=self.config.dim**-0.5)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        num_loops: int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Scores (B, num_labels) of each row's last real token; arguments as :meth:`OpenMythosForCausalLM.forward`.

        Padding is marked by ``attention_mask`` or, without one, by ``config.pad_token_id``; without either, there is
        none. ``labels`` are (B,) classes, or (B, num_labels) numbers, depending on ``config.problem_type``.
        """
        if attention_mask is None and input_ids is not None and self.config.pad_token_id is not None:
            attention_mask = input_ids != self.config.pad_token_id
        outputs = self.run(
            input_ids, inputs_embeds, attention_mask, position_ids, kwargs, auxiliary=labels is not None, cache=cache,
            past_key_values=past_key_values, use_cache=use_cache, num_loops=num_loops,
            output_hidden_states=output_hidden_states, output_attentions=output_attentions,
        )  # fmt: skip
        last = outputs.last_hidden_state
        B, T, _ = last.shape
        at = torch.full((B,), T - 1, device=last.device)
        if attention_mask is not None:
            order = torch.arange(1, T + 1, device=last.device)
            at = (attention_mask[:, -T:].to(last.device).bool() * order).argmax(-1)
        logits = self.score(last[torch.arange(B, device=last.device), at])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE: outputs.get(CACHE)}
        )


# Trainer looks these names up to decide whether label smoothing shifts labels, and pipelines to see what they can run.
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MODEL_TYPE] = "OpenMythosForCausalLM"
modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[MODEL_TYPE] = "OpenMythosForSequenceClassification"
