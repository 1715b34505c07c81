"""A conversation of a user and a model, over one cache."""

import codecs
from collections.abc import Callable, Iterator
from itertools import takewhile

import torch
from torch import Tensor

from open_mythos.arguments import checked
from open_mythos.cache import ROLLBACK
from open_mythos.fields import must
from open_mythos.generation.engine import Depth, Engine
from open_mythos.generation.engines import make_engine
from open_mythos.generation.finite import not_finite
from open_mythos.generation.sampling import Sampling, random_state
from open_mythos.inputs import check_n_loops
from open_mythos.interface import Model
from open_mythos.nn.exits import Exit
from open_mythos.nn.modes import eval_mode, evaluating
from open_mythos.tasks.tokenizer import Tokenizer

Messages = list[dict[str, str]]
"""Messages as chat templates take them: ``{"role": "user" or "assistant", "content": text}`` each."""
Template = Callable[[Messages], list[int]]
"""From messages, the last a user's, to the prompt tokens of the reply."""
SURE = 0.5
"""For models that answer questions: an answer ends after the first word whose probability is below this; if that is
its first word, ``UNSURE`` stands before it."""
UNSURE = "I am not sure: "


class Conversation:
    """The turns so far, and the model's next reply.

    Without a ``template`` a reply continues the text of all turns so far, each on a line of its own. If the tokenizer
    has a token that ends questions (``asks``), messages that do not end in it are kept as context and get no reply.

    Args:
        model: computes as in eval mode, whatever mode it is in.
        tokenizer: the one that the model was trained with.
        n_loops: loops for every token, ``cfg.max_loop_iters`` if None; may be changed at any time (:attr:`n_loops`).
        sampling: how tokens are drawn; may be changed at any time.
        exit: the early-exit rule; see :meth:`OpenMythos.forward`.
        template: turns messages into tokens, for a model that was trained to chat.
        generator: random state to draw from.

    Raises:
        ValueError: for a tokenizer with more tokens than the model.
    """

    @checked
    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        n_loops: int | None = None,
        sampling: Sampling | None = None,
        exit: Exit | None = None,
        template: Template | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        must(
            len(tokenizer.pieces) <= model.cfg.vocab_size,
            f"the tokenizer has {len(tokenizer.pieces)} tokens and the model {model.cfg.vocab_size}, so they do not "
            f"belong together; use the tokenizer that the model was trained with",
        )
        self.model, self.tokenizer, self.template = model, tokenizer, template or tokenizer.template
        self._engine: Engine | None = None
        self._held = list[int]()  # the tokens whose rows the cache holds
        self.sampling, self.exit, self.generator = sampling or Sampling(), exit, generator
        self._n_loops = check_n_loops(n_loops, model.cfg.max_loop_iters)
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        self.messages: Messages = []
        self.ids: list[int] = []  # tokens of the whole text, the last reply included
        self.n_replied = 0  # tokens of the last reply
        self._forget_cache()

    @property
    def n_loops(self) -> int:
        """Loops for every token. Setting it keeps the turns, which are then read again."""
        return self._n_loops

    @n_loops.setter
    def n_loops(self, n_loops: int) -> None:
        self._n_loops = check_n_loops(n_loops, self.model.cfg.max_loop_iters)
        self._forget_cache()

    @checked
    def reply(self, said: str, max_new_tokens: int = 256) -> Iterator[str]:
        """Yield the model's reply, in pieces of whole characters, as they are computed.

        If the iterator is closed early, or another reply is begun, the reply ends there. After an error, or Ctrl-C
        while the model computes, the conversation is as it was before the call. If the text is too long for the model,
        its oldest part is dropped.

        Args:
            said: the user's message.
            max_new_tokens: most tokens of the reply; at most half of ``cfg.max_seq_len``.

        Raises:
            ValueError: at the call, for an invalid message or length; and once logits are not finite.
        """
        must(max_new_tokens >= 0, f"max_new_tokens={max_new_tokens}; use 0 or more")
        try:
            said.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"said={said!r} contains an unpaired surrogate, so it is not valid text; remove that"
            ) from error
        return self._undone_if_it_fails(said, min(max_new_tokens, self.model.cfg.max_seq_len // 2))

    def _undone_if_it_fails(self, said: str, max_new_tokens: int) -> Iterator[str]:
        before = [dict(message) for message in self.messages], list(self.ids), self.n_replied
        put_back = random_state(self.generator, self.model.embed.weight.device)
        try:
            yield from self._reply(said, max_new_tokens)
        except GeneratorExit:
            raise
        except BaseException:
            self.messages[:], self.ids, self.n_replied = before
            put_back()
            raise

    def _reply(self, said: str, max_new_tokens: int) -> Iterator[str]:
        cfg = self.model.cfg
        self.messages.append({"role": "user", "content": said})
        self.ids = self._prompt(cfg.max_text_len - max(max_new_tokens, 1))
        must(len(self.ids) > 0, "the conversation is empty; say something first")
        reply = {"role": "assistant", "content": ""}
        self.messages.append(reply)
        self.n_replied, asks = 0, self.tokenizer.asks
        if asks is not None:
            is_asked, has_end = self.ids[-1] == asks, self.tokenizer.eos is not None
            max_new_tokens = max_new_tokens if is_asked and has_end else min(max_new_tokens, int(is_asked))
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for _ in range(max_new_tokens):
            if not self.messages or self.messages[-1] is not reply:  # another was begun, or all turns were forgotten
                return
            logits = self._logits()
            token = int(self.sampling.draw(logits, self.generator))
            is_end = token == self.tokenizer.eos
            repeats = asks is not None and self.n_replied > 0 and token == self.ids[-1]  # if loops are too few to end
            if repeats or (is_end and (asks is None or self.n_replied)):
                break
            self.ids.append(token)
            text = decoder.decode(self._piece(token))
            if asks is not None:
                is_end |= float(logits[0].float().softmax(-1)[token]) < SURE
                text = self._worded(text, is_end)
            self.n_replied += 1
            if text:
                reply["content"] += text
                yield text
            if is_end:
                break
        if text := decoder.decode(b"", final=True):
            reply["content"] += text
            yield text

    @checked
    @torch.no_grad()
    def trace(self, n: int | None = None) -> tuple[list[int], list[list[tuple[int, float]]]]:
        """What the model predicts after each loop in place of the last ``n`` tokens of the text.

        ``n`` is 8 if None; for a model that answers questions, only the first token of its answer is then traced.

        Returns:
            These tokens, n or as many as there are; and for each loop the most likely token at each position and its
            probability. Loops end when every position has halted.

        Raises:
            ValueError: if nothing was said.
        """
        is_answer = n is None and self.tokenizer.asks is not None
        n = max(1, self.n_replied) if is_answer else 8 if n is None else n
        must(n >= 1, f"n={n}; use at least 1")
        must(len(self.ids) > 1, "there is nothing to trace yet; say something first")
        n = min(n, len(self.ids) - 1)
        model, by_loop = self.model, []
        with eval_mode(model):
            e, ctx = model.encode(self._tensor(self.ids[:-1]))
            first, readout = model.first_state(e, ctx), model.readout(ctx)
            for state in model.recurrent.iterate(first, e, ctx, self.n_loops, self.exit, readout):
                logits = model.head(model.decode(state.h, ctx)[0, -n:])
                probability, token = logits.float().softmax(-1).max(-1)
                by_loop.append(list(zip(token.tolist(), probability.tolist(), strict=True))[: 1 if is_answer else n])
        return self.ids[-n:][: 1 if is_answer else n], by_loop

    def _worded(self, word: str, is_unsure: bool) -> str:
        """A word of an answer, with a space or ``UNSURE`` before it; an empty answer is spelt out."""
        return (" " if self.n_replied else UNSURE if is_unsure else "") + (word or "I have no answer")

    def _piece(self, token: int) -> bytes:
        # A model may have more tokens than its tokenizer, as its vocabulary size is rounded up.
        return self.tokenizer.pieces[token] if token < len(self.tokenizer.pieces) else b""

    def _prompt(self, room: int) -> list[int]:
        """The tokens that the reply continues, at most ``room``; the oldest turns or tokens are dropped."""
        if self.template is not None:
            while len(ids := self.template(self.messages)) > room and len(self.messages) > 1:
                del self.messages[:2]
            return ids[-room:]
        said = self.messages[-1]["content"]
        start = [] if self.tokenizer.eos is None else [self.tokenizer.eos]
        if self.ids and self._piece(self.ids[-1])[-1:] != b"\n":
            said = "\n" + said
        return ((self.ids or start) + self.tokenizer.encode([said]).tolist())[-room:]

    def _logits(self) -> Tensor:
        """Logits of the token after ``ids``, (1, vocab_size); cached tokens are not computed again."""
        held, self._held = self._held, []  # after an interruption, the cache may hold a token in part
        logits = evaluating(self.model, self._read, held)
        self._held = list(self.ids)
        return logits

    def _read(self, held: list[int]) -> Tensor:
        same = (mine == other for mine, other in zip(held, self.ids[:-1], strict=False))
        known = sum(takewhile(bool, same))
        if self._engine is None or known == 0 or len(held) - known > ROLLBACK:
            self._engine, known = make_engine("auto", self.model, self._depth()), 0
        else:
            self._engine.truncate(known)
        new = self.ids[known:]
        read = self._engine.step if known and len(new) == 1 else self._engine.extend
        logits = read(self._tensor(new))
        if not bool(logits.amax(-1).isfinite().all()):
            raise not_finite(self.model, self._depth(), [self._tensor(self.ids)])
        return logits

    def _depth(self) -> Depth:
        return Depth(self.n_loops, self.model.recurrent.choose_exit(self.exit))

    def _forget_cache(self) -> None:
        self._engine, self._held = None, []

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], device=self.model.embed.weight.device)
