"""Speed of training, prefill and decoding, with the operations and bytes to compare with the machine's rates."""

from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.diagnostics import cost
from open_mythos.diagnostics.machine import repeat
from open_mythos.generation.engine import Depth, Engine
from open_mythos.generation.engines import make_engine
from open_mythos.model import OpenMythos

NEW = 16  # tokens generated per repetition of decoding


@dataclass(frozen=True)
class Speed:
    """Measured repetitions of one kind of work.

    Attributes:
        work: train, prefill or decode.
        batch, tokens: rows, and tokens of each: those trained on, read, or in the cache before decoding.
        n_loops: loops of every token.
        per_repetition: tokens that each repetition trains on, reads or generates.
        flops: operations of a repetition, as :mod:`open_mythos.diagnostics.cost` counts them.
        bytes: bytes that a repetition must read; None unless it decodes.
        seconds: of each repetition.
    """

    work: str
    batch: int
    tokens: int
    n_loops: int
    per_repetition: int
    flops: float
    bytes: float | None
    seconds: list[float]

    @property
    def tokens_per_second(self) -> float:
        """Rate of the median repetition, like the other rates."""
        return self.per_repetition / median(self.seconds)

    @property
    def flops_per_second(self) -> float:
        return self.flops / median(self.seconds)

    @property
    def bytes_per_second(self) -> float | None:
        return None if self.bytes is None else self.bytes / median(self.seconds)


def train_speed(
    model: OpenMythos, batch: int, tokens: int, n_loops: int, dtype: torch.dtype = torch.float32, seconds: float = 10.0
) -> Speed:
    """Time training steps: forward, cross-entropy, backward, AdamW. The model's weights change.

    The model is in float32, on the device to use, and all loops have gradient; ``dtype`` bfloat16 turns on autocast.
    ``seconds`` in all, as of :func:`~open_mythos.diagnostics.machine.repeat`; the other arguments as :class:`Speed`.
    """
    ids, device = _random_ids(model, batch, tokens + 1), model.embed.weight.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    halves = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()

    def step() -> None:
        with halves:
            logits = model(ids[:, :-1], n_loops)
            loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    flops = batch * tokens * cost.flops_per_trained_token(model.cfg, n_loops, tokens)
    model.train()
    times = repeat(step, device, seconds, warm_up=4)  # the first steps allocate memory, which costs page faults
    model.eval()
    return Speed("train", batch, tokens, n_loops, batch * tokens, flops, None, times)


@torch.inference_mode()
def prefill_speed(model: OpenMythos, batch: int, tokens: int, n_loops: int, seconds: float = 5.0) -> Speed:
    """Time reading prompts into a cache, up to the logits of their last position; arguments as :func:`train_speed`.

    The model may be in any dtype, and is left in eval mode.
    """
    ids = _random_ids(model, batch, tokens)
    model.eval()
    times = repeat(lambda: _read(model, ids, n_loops, "modules"), ids.device, seconds)
    flops = batch * cost.flops_of_prompt(model.cfg, n_loops, tokens)
    return Speed("prefill", batch, tokens, n_loops, ids.numel(), flops, None, times)


@torch.inference_mode()
def decode_speed(
    model: OpenMythos, batch: int, tokens: int, n_loops: int, seconds: float = 5.0, engine: str = "auto"
) -> Speed:
    """Time greedy decoding of ``NEW`` tokens per repetition, after ``tokens`` in the cache; else as prefill_speed."""
    ids = _random_ids(model, batch, tokens)
    model.eval()
    first, made = _read(model, ids, n_loops, engine)

    def decode() -> None:
        made.truncate(tokens)
        token = first
        for _ in range(NEW):
            token = made.step(token).argmax(-1, keepdim=True)

    times = repeat(decode, ids.device, seconds)
    contexts = range(tokens + 1, tokens + NEW + 1)
    flops = batch * sum(cost.flops_per_token(model.cfg, n_loops, context) for context in contexts)
    size = model.embed.weight.element_size()
    read = sum(cost.bytes_per_decoding_step(model.cfg, n_loops, context, batch, size) for context in contexts)
    return Speed("decode", batch, tokens, n_loops, batch * NEW, flops, read, times)


def _random_ids(model: OpenMythos, batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.cfg.vocab_size, (batch, tokens), generator=generator).to(model.embed.weight.device)


def _read(model: OpenMythos, ids: Tensor, n_loops: int, engine: str) -> tuple[Tensor, Engine]:
    """The likeliest next token (B, 1), and an engine that has read the prompt."""
    made = make_engine(engine, model, Depth(n_loops))
    return made.extend(ids).argmax(-1, keepdim=True), made
