"""Sequence to sequence: an encoder that sees both ways, and a decoder that reads its states as a prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_mythos.arguments import checked
from open_mythos.fields import must
from open_mythos.inputs import check_ids, check_left_padding, check_n_loops, check_range
from open_mythos.model import OpenMythos
from open_mythos.nn.modes import evaluating

IGNORED = -100  # in a target: no token, and no loss; as in cross_entropy and transformers


@checked
class Seq2Seq(nn.Module):
    """One sequence in, another out, each side with its own number of loops.

    The encoder's states stand before the target's tokens as embeddings would, so the decoder attends to both with the
    attention it has, and decodes with the library's own cache and engines.

    Args:
        encoder: a model of ``causal=False``; its head is not used.
        decoder: a causal model, as wide; any vocabulary and number of layers. Its ``max_seq_len`` holds both sequences.

    Raises:
        ValueError: for models that do not go together.
    """

    def __init__(self, encoder: OpenMythos, decoder: OpenMythos) -> None:
        super().__init__()
        must(
            not encoder.cfg.causal,
            "the encoder was built with causal=True and does not attend to later tokens; use causal=False",
        )
        must(decoder.cfg.causal, "the decoder was built with causal=False, and cannot generate; use causal=True")
        dims = encoder.cfg.dim, decoder.cfg.dim
        must(
            dims[0] == dims[1],
            f"the encoder has dim={dims[0]}, but the decoder, which reads its states, {dims[1]}; use the same dim",
        )
        self.encoder, self.decoder = encoder, decoder

    @checked
    def encode(self, source: Tensor, n_loops: int | None = None, mask: Tensor | None = None) -> Tensor:
        """The encoder's last states as the decoder reads them, (B, S, dim), on the scale of its embeddings.

        Args:
            source: (B, S) tokens, padded on the left where rows differ in length.
            n_loops: of the encoder; its ``max_loop_iters`` if None.
            mask: (B, S), 0 at padding.

        Raises:
            ValueError: for input that does not fit.
        """
        check_ids(source, "source")
        self._check_room(source.shape[1])
        check_left_padding(mask, source)
        return self.encoder.hidden(source, n_loops, attention_mask=mask) * self.decoder.cfg.dim**-0.5

    @checked
    def forward(
        self, source: Tensor, target: Tensor, n_loops: int | None = None, encoder_loops: int | None = None,
        source_mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits (B, U, vocab_size) of each token of the target, given the source and the target before it.

        Args:
            source, source_mask: as :meth:`encode`.
            target: (B, U) tokens of the decoder, :data:`IGNORED` after the end of shorter rows.
            n_loops, encoder_loops: loops of the decoder and the encoder; each one's ``max_loop_iters`` if None.

        Raises:
            ValueError: for input that does not fit.
        """
        check_ids(source, "source")
        check_ids(target, "target")
        n_loops = check_n_loops(n_loops, self.decoder.cfg.max_loop_iters)
        rows = len(source), len(target)
        must(
            rows[0] == rows[1],
            f"source has {rows[0]} rows, but target {rows[1]}; pass one source row for each target row",
        )
        is_token, (S, U) = target != IGNORED, (source.shape[1], target.shape[1])
        tokens = target.masked_fill(~is_token, 0)
        check_range(tokens, self.decoder.cfg.vocab_size, "target")
        must(not is_token.int().diff(dim=1).gt(0).any(), f"target has {IGNORED} before tokens; pad it on the right")
        self._check_room(S, U)
        prefix = self.encode(source, encoder_loops, source_mask)
        before = torch.cat([prefix, self.decoder.embed(tokens[:, :-1])], 1)
        seen = torch.ones_like(source) if source_mask is None else source_mask
        mask = torch.cat([seen.bool(), is_token[:, :-1]], 1)
        return self.decoder.head(self.decoder.hidden(before, n_loops, attention_mask=mask, last=U))

    @checked
    def loss(self, source: Tensor, target: Tensor, **options: Any) -> Tensor:
        """Mean cross-entropy of the target's tokens; arguments as :meth:`forward`."""
        return F.cross_entropy(self(source, target, **options).flatten(0, 1).float(), target.flatten().long())

    @checked
    def generate(
        self, source: Tensor, max_new_tokens: int = 64, n_loops: int | None = None, encoder_loops: int | None = None,
        source_mask: Tensor | None = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        """The target of each source, (B, max_new_tokens), in eval mode, with a cache.

        Args:
            source, source_mask: as :meth:`encode`.
            max_new_tokens, n_loops: of the decoder.
            encoder_loops: of the encoder.
            options: of :meth:`OpenMythos.generate`: sampling, ``eos_token_id``, ``draft``, ``engine``, …

        Raises:
            ValueError: for input, options or lengths that do not fit, before anything is encoded.
        """
        check_ids(source, "source")
        unknown = self.decoder.embed.weight.new_zeros(1).expand(*source.shape, self.decoder.cfg.dim)
        decoding = dict(max_new_tokens=max_new_tokens, n_loops=n_loops, attention_mask=source_mask, **options)
        self.decoder.stream(unknown, **decoding)  # checks all arguments before anything is encoded
        with torch.no_grad():
            prefix = evaluating(self.encoder, self.encode, source, encoder_loops, source_mask)
        return self.decoder.generate(prefix, **decoding)

    @checked
    def save_pretrained(self, directory: str | Path) -> None:
        """Write both, into ``encoder`` and ``decoder`` in ``directory``; as :meth:`OpenMythos.save_pretrained`."""
        self.encoder.save_pretrained(Path(directory) / "encoder")
        self.decoder.save_pretrained(Path(directory) / "decoder")

    @classmethod
    @checked
    def from_pretrained(cls, directory: str | Path) -> Seq2Seq:
        """What :meth:`save_pretrained` wrote, in eval mode; raises as :meth:`OpenMythos.from_pretrained`."""
        return cls(*(OpenMythos.from_pretrained(Path(directory) / name) for name in ("encoder", "decoder"))).eval()

    def _check_room(self, S: int, U: int = 1) -> None:
        for name, n in (("encoder", S), ("decoder", S + U - 1)):
            limit = getattr(self, name).cfg.max_seq_len
            must(
                n <= limit,
                f"a source of {S} tokens and a target of {U} take {n} positions of the {name}, more than "
                f"max_seq_len={limit}; shorten them, or raise model.{name}.cfg.max_seq_len",
            )
