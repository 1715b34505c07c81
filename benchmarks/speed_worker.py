"""One side of a workload of benchmarks/speed.py: a process that times a repetition whenever it is told to.

    PYTHON benchmarks/speed_worker.py TASK        TASK as speed.py's ``Task``, in JSON

The reference implementation has this library's import name, so each side runs in an interpreter of its own, and imports
its package only where it is used. The process writes lines of JSON: first a description of what was built, or
``{"missing": why}``; then, for each line that it reads, the measurements of one repetition, after one that does not
count.
"""

import copy
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

NEW = 24  # tokens that are generated in a repetition of decoding
STEPS = 3  # training steps in a repetition
Measured = dict[str, float]


# -- sides: the same few calls for every model


class Ours:
    """This library; with ``halting`` and ``warm_start`` off, positions run exactly the given number of loops.

    For the engine "modules", a hook is registered, so that no other engine bypasses the modules.
    """

    def __init__(self, model: dict[str, Any], loops: int, engine: str = "modules") -> None:
        from open_mythos import KVCache, MythosConfig, OpenMythos
        from open_mythos.generation.engine import Depth
        from open_mythos.generation.engines import make_engine

        config = MythosConfig(**model | dict(halting=False, warm_start=False))
        self.model, self.loops, self.new_cache = OpenMythos(config), loops, KVCache
        if engine == "modules":
            self.model.recurrent.layers[-1].attn.register_forward_hook(lambda *_: None)
        self.new_engine = lambda: make_engine(engine, self.model, Depth(loops))

    def logits(self, ids: Tensor) -> Tensor:
        return self.model(ids, self.loops)

    def logits_recomputed(self, ids: Tensor) -> Tensor:
        """As :meth:`logits`, but the backward pass recomputes each loop instead of keeping its activations."""
        return self.model.head(self.model.hidden(ids, self.loops, recompute=True))

    def prefill(self, ids: Tensor) -> Tensor:
        """Logits of the last position, with a cache of all positions filled."""
        return self.model.head(self.model.hidden(ids, self.loops, self.new_cache(), last=1))

    def read(self, ids: Tensor) -> Any:
        """The state that :meth:`next` continues from, after reading ``ids`` as generation reads a prompt."""
        engine = self.new_engine()
        engine.extend(ids)
        return engine

    def rewound(self, engine: Any, length: int) -> Any:
        """The same state, cut back to the prompt."""
        engine.truncate(length)
        return engine

    def next(self, ids: Tensor, engine: Any, position: int) -> Tensor:
        """Logits (B, vocab_size) of the next token."""
        return engine.step(ids)


class Reference(Ours):
    """open-mythos 0.5.0; its gate is kept closed, since otherwise it would skip loops and weight states."""

    def __init__(self, model: dict[str, Any], loops: int, engine: str = "") -> None:
        from open_mythos.main import MythosConfig, OpenMythos

        self.model, self.loops = OpenMythos(MythosConfig(**model, act_threshold=1e9)), loops
        nn.init.constant_(self.model.recurrent.act.halt.bias, -3.0)

    def prefill(self, ids: Tensor) -> Tensor:
        """Its forward pass always computes the logits of all positions."""
        return self.model(ids, self.loops, kv_cache={})[:, -1:]

    def read(self, ids: Tensor) -> Any:
        cache: dict[str, Any] = {}
        self.model(ids, self.loops, kv_cache=cache)
        return cache

    def rewound(self, cache: Any, length: int) -> Any:
        return copy.copy(cache)  # slots are replaced, never written to

    def next(self, ids: Tensor, cache: Any, position: int) -> Tensor:
        return self.model(ids, self.loops, kv_cache=cache, start_pos=position)[:, -1]


class Llama:
    """A dense decoder of Hugging Face transformers, whose depth is its number of layers."""

    def __init__(self, model: dict[str, Any], loops: int, engine: str = "") -> None:
        from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

        self.model, self.new_cache = LlamaForCausalLM(LlamaConfig(**model)), DynamicCache

    def logits(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits

    def read(self, ids: Tensor) -> Any:
        cache = self.new_cache(config=self.model.config)
        self.model(ids, None, None, cache, use_cache=True, logits_to_keep=1)
        return cache

    def rewound(self, cache: Any, length: int) -> Any:
        return copy.deepcopy(cache)

    def next(self, ids: Tensor, cache: Any, position: int) -> Tensor:
        return self.model(ids, None, None, cache, use_cache=True).logits[:, -1]


SIDES: dict[str, Any] = {"ours": Ours, "reference": Reference, "llama": Llama}


# -- experts


@torch.no_grad()
def router_inputs(side: Ours, ids: Tensor) -> list[Tensor]:
    """The inputs of the router at each loop, (N, dim)."""
    seen: list[Tensor] = []
    hook = side.model.recurrent.block.ffn.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, -2)))
    side.model.eval()
    side.logits(ids)
    side.model.train()
    hook.remove()
    return seen


@torch.no_grad()
def experts_used(side: Ours, ids: Tensor) -> float:
    """The number of experts that get a token of the batch, as a mean over loops."""
    ffn = side.model.recurrent.block.ffn
    chosen = [(ffn.router(x) + ffn.router_bias).topk(ffn.topk).indices for x in router_inputs(side, ids)]
    return sum(len(of_loop.unique()) for of_loop in chosen) / len(chosen)


@torch.no_grad()
def spread_experts(side: Ours, ids: Tensor) -> None:
    """Project the mean of each loop's tokens out of the router's weights, so that it distinguishes the tokens.

    At initialisation, the reference's tokens are all similar, and it sends them to the same few experts. Scaling its
    weights would change nothing, since the largest scores are chosen.
    """
    router = side.model.recurrent.block.ffn.router
    for _ in range(2):  # the routing at a loop changes the inputs of the next
        common = torch.stack([x.mean(0) for x in router_inputs(side, ids)])
        directions = torch.linalg.qr(common.T).Q
        router.weight -= (router.weight @ directions) @ directions.T


# -- workloads: a task's repetition


def clock() -> float:
    """Seconds; with one thread, the CPU time of this process, which other work on the machine affects less."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def training_step(side: Any, ids: Tensor, task: dict[str, Any]) -> Callable[[], None]:
    """A step of forward, cross-entropy, backward and AdamW."""
    # Within ten steps, tokens would go to few experts again; at a learning rate of 0 the arithmetic is the same.
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
        started = clock()
        for _ in range(STEPS):
            step()
        return {"tokens/s": STEPS * ids[:, 1:].numel() / (clock() - started)}

    return repetition


def memory(side: Any, ids: Tensor, task: dict[str, Any]) -> Callable[[], Measured]:
    """The growth of this process's peak resident size in the first training step."""
    step = training_step(side, ids, task)

    def repetition() -> Measured:
        before = resident()
        step()
        return {"growth MB": resident() - before, "total MB": resident()}

    return repetition


def resident() -> float:
    """Peak resident size of this process so far, in megabytes."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, ru_maxrss starts at the size of the parent process
        kilobytes = dict(line.split(":", 1) for line in status.read_text().splitlines())["VmHWM"]
        return int(kilobytes.split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def prefill(side: Any, ids: Tensor, task: dict[str, Any]) -> Callable[[], Measured]:
    side.model.eval()

    def repetition() -> Measured:
        started = clock()
        with torch.inference_mode():
            side.prefill(ids[:, :-1])
        return {"tokens/s": ids[:, 1:].numel() / (clock() - started)}

    return repetition


def decoding(side: Any, ids: Tensor, task: dict[str, Any]) -> Callable[[], Measured]:
    """Greedy decoding of ``NEW`` tokens after a prompt that is in the cache."""
    side.model.eval()
    length = task["tokens"]
    with torch.inference_mode():
        filled = side.read(ids[:, :-1])

    def repetition() -> Measured:
        cache, token = side.rewound(filled, length), ids[:, -1:]
        started = clock()
        with torch.inference_mode():
            for i in range(NEW):
                token = side.next(token, cache, length + i).argmax(-1, keepdim=True)
        return {"tokens/s": len(ids) * NEW / (clock() - started)}

    return repetition


WORKS = {"train": training, "memory": memory, "prefill": prefill, "decode": decoding}


def main() -> None:
    task = json.loads(sys.argv[1])
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # in case a package prints something

    def reply(found: dict[str, Any]) -> None:
        print(json.dumps(found), file=replies, flush=True)

    try:
        built, repetition = make_ready(task)
        reply(built)
        for _ in sys.stdin:
            if task["work"] != "memory":
                repetition()  # while waiting for its turn, it has lost its data in CPU caches, and perhaps pages
            reply(repetition())
    except ImportError as error:
        reply({"missing": str(error)})
    except Exception:
        reply({"failed": traceback.format_exc()})


def make_ready(task: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], Measured]]:
    """A description of what was built, and its repetition, which has been run once unless it measures memory."""
    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    side = SIDES[task["side"]](task["model"], task["loops"], task["engine"])
    ids = torch.randint(task["model"]["vocab_size"], (task["batch"], task["tokens"] + 1))
    built: dict[str, Any] = {"parameters": sum(p.numel() for p in side.model.parameters())}
    built["capability"] = torch.backends.cpu.get_cpu_capability()
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
