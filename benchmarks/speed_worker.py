"""One side of a workload of benchmarks/speed.py: a process that times a repetition whenever it is told to.

    PYTHON benchmarks/speed_worker.py TASK        TASK as speed.py's ``Task``, in JSON

The reference implementation has this library's import name, so each side runs under an interpreter of its own, and a
side is imported where it is used. Speaks JSON, a line each: first what was built, or ``{"missing": why}``; then, for
each line that comes in, what one repetition measured, after one that does not count.
"""

import copy
import inspect
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NEW = 24  # tokens that a repetition of decoding makes
STEPS = 3  # of training that a repetition takes
Measured = dict[str, float]


class Missing(Exception):
    """Says what this interpreter lacks for the task."""


# -- sides: the same few calls for every model


class Ours:
    """This library; positions run the loops asked for and no others, as ``halting`` and ``warm_start`` are off."""

    def __init__(self, model: dict[str, Any], loops: int) -> None:
        from open_mythos import KVCache, MythosConfig, OpenMythos
        from open_mythos.generation.decoder import make_decoder

        config = MythosConfig(**model | dict(halting=False, warm_start=False))
        self.model, self.loops, self.new_cache = OpenMythos(config), loops, KVCache
        self.make_decoder = make_decoder

    def logits(self, ids: Tensor) -> Tensor:
        return self.model(ids, self.loops)

    def logits_recomputed(self, ids: Tensor) -> Tensor:
        """As :meth:`logits`, for a backward pass that computes each loop again instead of keeping it."""
        from open_mythos.training.unroll import unroll

        e, freqs, mask = self.model.encode(ids)
        loops = torch.full((len(ids),), self.loops)
        for stage in unroll(self.model, self.model.first_state(e), e, freqs, mask, loops, loops, recompute=True):
            h = stage.after
        return self.model.head(self.model.decode(h, freqs, mask))

    def prefill(self, ids: Tensor) -> tuple[Tensor, Any]:
        """Logits of the last position, and a cache of all."""
        cache = self.new_cache()
        return self.model.head(self.model.hidden(ids, self.loops, cache, last=1)), cache

    def rewound(self, cache: Any, length: int) -> Any:
        """A cache that holds the prompt alone."""
        cache.truncate(length)
        self.decoder = self.make_decoder(self.model, self.loops, padded=False)  # as generate() does for every text
        return cache

    def next(self, ids: Tensor, cache: Any, position: int) -> Tensor:
        return self.decoder.logits(ids, cache, self.loops)


class Reference(Ours):
    """open-mythos 0.5.0; its gate is held shut, or it would leave loops out and weigh states by it."""

    def __init__(self, model: dict[str, Any], loops: int) -> None:
        from open_mythos.main import MythosConfig, OpenMythos

        self.model, self.loops = OpenMythos(MythosConfig(**model, act_threshold=1e9)), loops
        nn.init.constant_(self.model.recurrent.act.halt.bias, -3.0)

    def prefill(self, ids: Tensor) -> tuple[Tensor, Any]:
        """Its forward pass knows logits of all positions only."""
        cache: dict[str, Any] = {}
        return self.model(ids, self.loops, kv_cache=cache)[:, -1:], cache

    def rewound(self, cache: Any, length: int) -> Any:
        return copy.copy(cache)  # slots are replaced, never written to

    def next(self, ids: Tensor, cache: Any, position: int) -> Tensor:
        return self.model(ids, self.loops, kv_cache=cache, start_pos=position)


class Llama:
    """A dense decoder of Hugging Face transformers, its depth its layers."""

    def __init__(self, model: dict[str, Any], loops: int) -> None:
        from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

        self.model, self.new_cache = LlamaForCausalLM(LlamaConfig(**model)), DynamicCache

    def logits(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits

    def prefill(self, ids: Tensor) -> tuple[Tensor, Any]:
        cache = self.new_cache(config=self.model.config)
        return self.model(ids, None, None, cache, use_cache=True, logits_to_keep=1).logits, cache

    def rewound(self, cache: Any, length: int) -> Any:
        return copy.deepcopy(cache)

    def next(self, ids: Tensor, cache: Any, position: int) -> Tensor:
        return self.model(ids, None, None, cache, use_cache=True).logits


SIDES: dict[str, Any] = {"ours": Ours, "reference": Reference, "llama": Llama}


# -- experts


@torch.no_grad()
def router_inputs(side: Ours, ids: Tensor) -> list[Tensor]:
    """What the router sees at each loop, (N, dim)."""
    seen: list[Tensor] = []
    hook = side.model.recurrent.block.ffn.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, -2)))
    side.model.eval()
    side.logits(ids)
    side.model.train()
    hook.remove()
    return seen


@torch.no_grad()
def experts_used(side: Ours, ids: Tensor) -> float:
    """Experts that get a token of the batch, the mean over loops."""
    ffn = side.model.recurrent.block.ffn
    chosen = [(ffn.router(x) + ffn.router_bias).topk(ffn.topk).indices for x in router_inputs(side, ids)]
    return sum(len(of_loop.unique()) for of_loop in chosen) / len(chosen)


@torch.no_grad()
def spread_experts(side: Ours, ids: Tensor) -> None:
    """Make the router blind to what all tokens of a loop have in common, so that it tells them apart.

    The reference's tokens all look alike at initialisation, and it sends them to the same few experts. Scaling its
    weights would change nothing, as the choice is of the largest.
    """
    router = side.model.recurrent.block.ffn.router
    for _ in range(2):  # what the router does changes what it sees at the next loop
        common = torch.stack([x.mean(0) for x in router_inputs(side, ids)])
        directions = torch.linalg.qr(common.T).Q
        router.weight -= (router.weight @ directions) @ directions.T


# -- workloads: a task's repetition


def training_step(side: Any, ids: Tensor, task: dict[str, Any]) -> Callable[[], None]:
    """Forward, cross-entropy, backward, AdamW."""
    # Experts that were spread would gather again within ten steps: at a learning rate of 0 the arithmetic is the same.
    optimizer = torch.optim.AdamW(side.model.parameters(), lr=0.0 if task["spread"] else 1e-4)
    logits = side.logits_recomputed if task["recompute"] else side.logits

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=task["bf16"]):
            loss = F.cross_entropy(logits(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def training(side: Any, ids: Tensor, task: dict[str, Any]) -> Callable[[], Measured]:
    step = training_step(side, ids, task)

    def repetition() -> Measured:
        started = time.perf_counter()
        for _ in range(STEPS):
            step()
        return {"tokens/s": STEPS * ids[:, 1:].numel() / (time.perf_counter() - started)}

    return repetition


def memory(side: Any, ids: Tensor, task: dict[str, Any]) -> Callable[[], Measured]:
    """What the first training step adds to the greatest resident size of this process."""
    step = training_step(side, ids, task)

    def repetition() -> Measured:
        before = resident()
        step()
        return {"growth MB": resident() - before, "total MB": resident()}

    return repetition


def resident() -> float:
    """Greatest resident size of this process so far, in megabytes."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss begins at the size of the process that started this one
        kilobytes = dict(line.split(":", 1) for line in status.read_text().splitlines())["VmHWM"]
        return int(kilobytes.split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def prefill(side: Any, ids: Tensor, task: dict[str, Any]) -> Callable[[], Measured]:
    side.model.eval()

    def repetition() -> Measured:
        started = time.perf_counter()
        with torch.inference_mode():
            side.prefill(ids[:, :-1])
        return {"tokens/s": ids[:, 1:].numel() / (time.perf_counter() - started)}

    return repetition


def decoding(side: Any, ids: Tensor, task: dict[str, Any]) -> Callable[[], Measured]:
    """The likeliest token, ``NEW`` times, after a prompt that is in the cache."""
    if task["compile"]:
        return decoding_compiled(side, ids)
    side.model.eval()
    length = task["tokens"]
    with torch.inference_mode():
        _, filled = side.prefill(ids[:, :-1])

    def repetition() -> Measured:
        cache, token = side.rewound(filled, length), ids[:, -1:]
        started = time.perf_counter()
        with torch.inference_mode():
            for i in range(NEW):
                token = side.next(token, cache, length + i)[:, -1].argmax(-1, keepdim=True)
        return {"tokens/s": len(ids) * NEW / (time.perf_counter() - started)}

    return repetition


def decoding_compiled(side: Any, ids: Tensor) -> Callable[[], Measured]:
    """The same through the library's own loop, which is what knows how to compile."""
    if "compile" not in inspect.signature(side.model.stream).parameters:
        raise Missing("this version of the library cannot compile decoding: OpenMythos.stream has no `compile`")

    def repetition() -> Measured:
        stream = side.model.stream(ids[:, :-1], 1 + NEW, side.loops, temperature=0, compile=True)
        next(stream)  # the prompt
        started = time.perf_counter()
        assert sum(1 for _ in stream) == NEW
        return {"tokens/s": len(ids) * NEW / (time.perf_counter() - started)}

    return repetition


WORKS = {"train": training, "memory": memory, "prefill": prefill, "decode": decoding}


def main() -> None:
    task = json.loads(sys.argv[1])
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a package prints

    def reply(found: dict[str, Any]) -> None:
        print(json.dumps(found), file=replies, flush=True)

    try:
        built, repetition = make_ready(task)
        reply(built)
        for _ in sys.stdin:
            if task["work"] != "memory":
                repetition()  # who has waited for a turn has lost its place in caches, and perhaps pages
            reply(repetition())
    except (ImportError, Missing) as error:
        reply({"missing": str(error)})
    except Exception:
        reply({"failed": traceback.format_exc()})


def make_ready(task: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], Measured]]:
    """What was built, and its repetition, which has been run once unless it measures memory."""
    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    side = SIDES[task["side"]](task["model"], task["loops"])
    ids = torch.randint(task["model"]["vocab_size"], (task["batch"], task["tokens"] + 1))
    built: dict[str, Any] = {"parameters": sum(p.numel() for p in side.model.parameters())}
    if task["spread"]:
        spread_experts(side, ids[:, :-1])
    repetition = WORKS[task["work"]](side, ids, task)
    if task["work"] != "memory":
        repetition()
    if task["work"] == "train" and task["side"] != "llama":
        built["experts_used"] = experts_used(side, ids[:, :-1])
    return built, repetition


if __name__ == "__main__":
    main()
