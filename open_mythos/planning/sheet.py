"""Costs of a layout on every GPU: bytes by kind, collectives, and the time of a step with what bounds it.

As :mod:`open_mythos.training.parallel` runs it: a unit that several GPUs divide is gathered once a step, in float32,
and stays whole to its end; its gradient is reduced once a micro-batch, whatever the number of loops and recomputations.
In bfloat16, autocast copies weights: those of experts in every loop, others once. Experts are assumed to be chosen
evenly.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

from open_mythos.config import MythosConfig
from open_mythos.diagnostics import flops_per_trained_token
from open_mythos.diagnostics.cost import FLOPS_PER_MULTIPLY_ADD
from open_mythos.planning.hardware import Link
from open_mythos.planning.job import Job, Layout
from open_mythos.planning.rank import Pieces, Unit, pieces, units
from open_mythos.training.objective import MAX_LOGITS
from open_mythos.training.parallel.experts import goes_everywhere

_FLOAT32 = 4  # bytes of a number in parameters, gradients, moments, and in gathers and reductions


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at the peak of a step, by kind."""

    parameters: float  # this GPU's share
    moments: float  # of the optimizer
    average: float  # averaged weights (EMA)
    gathered: float  # whole units
    copies: float  # of weights, in bfloat16
    gradients: float  # whole ones until they are reduced, buffers of a reduction, this GPU's share
    activations: float  # kept for the backward pass
    dispatch: float  # tokens on their way to experts of other GPUs, and back
    working: float  # temporary buffers

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Collective:
    """The calls of one kind of collective in a step, in one group of GPUs.

    Attributes:
        kind: ``all_gather``, ``reduce_scatter``, ``all_reduce`` or ``all_to_all``.
        group: mesh dimension of the GPUs that take part: ``shard``, ``replicate``, ``expert`` or ``tensor``; for
            divided experts also ``slices``, which divide the same experts, and ``copies``, which hold the same part.
        of: the unit that is moved; ``gradients`` of all that is not sharded; ``tokens``, ``their gradients``, the
            experts' outputs (``results``, and gradients of these), or their ``counts``; for a divided vocabulary
            ``embeddings``, ``gradients of states``, and ``statistics`` of logits.
        count: calls a step.
        bytes: of one call on one GPU: the output of all_gather, the input of the others.
        size: GPUs of the group.
    """

    kind: str
    group: str
    of: str
    count: int
    bytes: float
    size: int


@dataclass(frozen=True)
class Sheet:
    """The costs of a :class:`Layout` for a :class:`Job`: memory, traffic and time."""

    job: Job
    layout: Layout

    @cached_property
    def units(self) -> list[Unit]:
        return units(self.job.config, self.layout.tensor, self.layout.expert, self.layout.slices)

    @cached_property
    def pieces(self) -> Pieces:
        return pieces(self.job.config, self.layout.tensor, self.job.length, self.job.is_bf16)

    def sharers(self, unit: Unit) -> int:
        """Number of GPUs over which FSDP divides a unit."""
        return self.layout.slices if unit.is_routed else self.layout.shard

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one GPU."""
        return self.layout.rows * self.job.length

    @cached_property
    def memory(self) -> Memory:
        """Memory at the peak: at the loss, in the backward pass of a loop, at a reduction, or after the last one."""
        job, layout, one, again = self.job, self.layout, self.pieces, self.layout.recompute
        share = _FLOAT32 * sum(unit.numel / self.sharers(unit) for unit in self.units)
        muon = _FLOAT32 * sum(unit.n_muon / self.sharers(unit) for unit in self.units)
        late = [unit for unit in self.units if not unit.name.startswith(("prelude", "coda"))]
        whole = {unit: _FLOAT32 * unit.numel for unit in self.units if self.sharers(unit) > 1}
        largest = max((unit for unit in late if unit in whole), key=whole.__getitem__, default=None)
        buffer = 0 if largest is None else whole[largest]
        reduced = 0 if largest is None else buffer + buffer / self.sharers(largest)
        own = _FLOAT32 * sum(unit.numel for unit in self.units if unit not in whole)
        earlier = share if layout.accumulate > 1 else 0.0  # gradients of earlier micro-batches
        grads = sum(whole[unit] for unit in late if unit in whole) + max(own, earlier)
        copies = 2 * job.is_bf16 * sum(unit.numel - unit.n_routed for unit in self.units)
        early = 2 * job.is_bf16 * sum(u.numel - u.n_routed for u in self.units if not u.name.startswith("coda"))
        routed = 2 * job.is_bf16 * sum(unit.n_routed for unit in self.units)  # in each loop
        of_layer = sum(unit.n_routed for unit in self.units) / max(1, job.cfg.core_layers)
        # gradients of gate and up arise when their copies and the experts' activations are already freed
        gone = self.tokens * job.cfg.n_experts_per_tok * (3 * job.cfg.expert_dim + job.cfg.dim) * job.number
        gradient = max(0, (_FLOAT32 + 2 * job.is_bf16) * of_layer * 2 / 3 - gone)
        loop, state = layout.rows * one.loop.kept, layout.rows * one.state
        before = layout.rows * (one.ends.kept + job.cfg.prelude_layers * one.block.kept)
        coda = layout.rows * job.cfg.coda_layers * one.block.kept
        n, at_once = job.grad_loops, min(self.tokens, max(1, MAX_LOGITS // job.cfg.vocab_size)) / one.loss_tokens
        kept, kept_routed = (before + n * state, 0) if again else (before + n * loop, n * routed)
        working, travelling = one.loop.needs(layout.rows), self.dispatch_bytes
        left = kept + loop if again else kept - loop, 0 if again else kept_routed - routed
        moments = [  # copies, gradients, activations, dispatch, temporary buffers
            (copies + kept_routed, earlier, kept, travelling, buffer),  # a gather's buffer stays until the next gather
            (copies + kept_routed, earlier, kept + coda + at_once * one.loss.kept, 0.0, at_once * one.loss.working),
            (early + kept_routed, earlier, kept + loop * again, travelling, working + gradient),
            (early + left[1], grads, left[0], travelling, working + gradient),
            (early, grads + reduced, before, 0.0, 0.0),
            (0.0, share, 0.0, 0.0, 0.0),
        ]
        moment = max(moments, key=sum)
        ema, adam = share * job.settings.ema, 2 * share - muon * (job.settings.optimizer == "muon")
        return Memory(share, adam, ema, sum(whole.values()), *moment)

    @property
    def dispatch_bytes(self) -> float:
        """Bytes of one loop's dispatch: rows sent and received, and results likewise."""
        return 2 * self.travelling(self.sent) + 2 * self.travelling(self.reached, 0) if self.layout.expert > 1 else 0.0

    def travelling(self, places: float, beside: int = 2) -> float:
        """Bytes that one GPU passes to an all-to-all if a token is sent to ``places`` GPUs.

        With each token go ``beside`` numbers for each of its experts: the expert's index and its weight.
        """
        cfg = self.job.cfg
        return self.tokens * places * (cfg.dim + beside * cfg.n_experts_per_tok) * self.job.number

    @property
    def reached(self) -> float:
        """Expected number of GPUs that have some of a token's experts."""
        n, topk, size = self.job.cfg.n_experts, self.job.cfg.n_experts_per_tok, self.layout.expert
        return size * (1 - math.comb(n - n // size, topk) / math.comb(n, topk))

    @property
    def sent(self) -> float:
        """GPUs that a token is sent to."""
        size = self.layout.expert
        return size if goes_everywhere(size, self.job.cfg.n_experts_per_tok) else self.reached

    @cached_property
    def collectives(self) -> list[Collective]:
        """All collectives of a step, except small ones at its end: of the norm, the experts' load, the loss."""
        job, layout, cfg = self.job, self.layout, self.job.cfg
        found, left = [], dict[str, float]()
        for unit in self.units:
            shards, copies = ("slices", "copies") if unit.is_routed else ("shard", "replicate")
            n, n_copies, size = self.sharers(unit), getattr(layout, copies), _FLOAT32 * unit.numel
            if n > 1:
                found.append(Collective("all_gather", shards, unit.name, 1, size, n))
                found.append(Collective("reduce_scatter", shards, unit.name, layout.accumulate, size, n))
                if n_copies > 1:
                    found.append(Collective("all_reduce", copies, unit.name, layout.accumulate, size / n, n_copies))
            elif n_copies > 1:
                left[copies] = left.get(copies, 0) + size
        for group, total in left.items():
            found.append(Collective("all_reduce", group, "gradients", 1, total, getattr(layout, group)))
        passes = job.loops + job.grad_loops * (1 + layout.recompute)  # forward, backward, recomputation
        n = layout.accumulate * cfg.core_layers * passes
        if layout.expert > 1:
            size, back = layout.expert, layout.accumulate * cfg.core_layers * job.grad_loops
            if not goes_everywhere(size, cfg.n_experts_per_tok):
                found.append(Collective("all_to_all", "expert", "counts", n - back, 16 * size, size))
            for of, count, taken in (
                ("tokens", n - back, self.travelling(self.sent)),
                ("their gradients", back, self.travelling(self.reached)),
                ("results", n, self.travelling(self.reached, 0)),
            ):
                found.append(Collective("all_to_all", "expert", of, count, taken, size))
        if layout.tensor > 1:
            n = n if cfg.n_shared_experts or not cfg.n_experts else 0
            n += 2 * layout.accumulate * (cfg.prelude_layers + cfg.coda_layers)
            rows = self.tokens * cfg.dim * job.number
            found.append(Collective("all_reduce", "tensor", "tokens", n, rows, layout.tensor))
        if self.vocabulary > 1:
            n, rows = layout.accumulate, self.tokens * cfg.dim
            chunk = max(1, MAX_LOGITS // cfg.vocab_size)
            parts = layout.accumulate * math.ceil(self.tokens / chunk)
            again = parts * (1 + (self.tokens > chunk))  # chunks are recomputed in the backward pass
            for of, count, taken in (
                ("embeddings", n, _FLOAT32 * rows), ("gradients of states", parts, n * job.number * rows / parts),
                ("statistics", 3 * again, _FLOAT32 * 2 * self.tokens * n / parts),
            ):  # fmt: skip
                found.append(Collective("all_reduce", "tensor", of, count, taken, layout.tensor))
        return found

    @property
    def vocabulary(self) -> int:
        """GPUs that divide the vocabulary."""
        return self.layout.tensor if self.job.cfg.vocab_size % self.layout.tensor == 0 else 1

    def link(self, group: str, size: int) -> Link:
        """The link of a group; neighbouring GPUs form tensor groups, then expert, shard and replica groups."""
        tensor, layout = self.layout.tensor, self.layout
        experts = tensor * layout.expert
        apart = {"shard": tensor, "replicate": tensor * layout.shard, "expert": tensor, "tensor": 1,
                 "slices": experts, "copies": experts * layout.slices}  # fmt: skip
        return self.job.links[apart[group] * size > self.job.settings.node]

    def seconds(self, one: Collective) -> float:
        """Time of all calls of a collective: latency of a tree, and bytes over the link's rate (Thakur et al. 2005)."""
        link, trips = self.link(one.group, one.size), 2 if one.kind == "all_reduce" else 1
        moved = (one.size - 1) / one.size * one.bytes
        return one.count * trips * (link.latency * (one.size - 1).bit_length() + moved / link.rate)

    @cached_property
    def flops(self) -> float:
        """FLOPs of a step on one GPU. A tensor group divides feed-forwards and head; all else each GPU computes."""
        job, layout = self.job, self.layout
        passes = job.loops + job.grad_loops * (2 + layout.recompute)
        saved = 0.0
        if layout.tensor > 1:
            alone = units(job.config, 1, layout.expert, layout.slices)
            for whole, part in zip(alone, self.units, strict=True):
                core = whole.n_core - part.n_core
                saved += FLOPS_PER_MULTIPLY_ADD * (passes * core + 3 * (whole.numel - part.numel - core))
            if not job.cfg.tied_head:  # embeddings are looked up
                looked_up = job.cfg.vocab_size * job.cfg.dim * (1 - 1 / self.vocabulary)
                saved -= FLOPS_PER_MULTIPLY_ADD * 3 * looked_up
        each = _flops(job.config, job.loops, job.length, job.grad_loops, layout.recompute) - saved
        return each * job.batch_size * job.length / (layout.replicate * layout.shard)

    @cached_property
    def traffic(self) -> float:
        """Bytes of its memory that a GPU reads and writes in a step: weights at each use, activations, the update."""
        job, layout, one = self.job, self.layout, self.pieces
        passes = job.loops + job.grad_loops * (2 + layout.recompute)
        weights = job.number * sum(u.n_core * passes + (u.numel - u.n_core) * 3 for u in self.units)
        weights += job.is_bf16 * sum(u.n_routed for u in self.units) * passes * (_FLOAT32 + 2)
        n_blocks = job.cfg.prelude_layers + job.cfg.coda_layers
        kept = layout.rows * (one.ends.kept + n_blocks * one.block.kept + job.grad_loops * one.loop.kept)
        kept += self.tokens / one.loss_tokens * one.loss.kept
        # written and read, and once more as gradients of about the same size
        activations = 4 * kept + 2 * layout.rows * one.loop.kept * (passes - 3 * job.grad_loops)
        share = _FLOAT32 * sum(unit.numel / self.sharers(unit) for unit in self.units)
        update = share * (7 + 2 * job.settings.ema)  # weights, two moments, average: both ways; gradients read
        return layout.accumulate * (weights + activations) + update

    @cached_property
    def times(self) -> dict[str, float]:
        """Seconds of a step that matrix products, memory and the interconnect would take alone. Of the interconnect
        only exposed time counts: transfers of units overlap with prelude and coda, those of tokens with nothing.
        """
        job, n_blocks = self.job, self.job.cfg.prelude_layers + self.job.cfg.coda_layers
        compute = self.flops / (job.device.flops / (1 if job.is_bf16 else 2) * job.settings.efficiency)
        memory, waited = self.traffic / job.device.bandwidth, ("expert", "tensor")
        units = sum(self.seconds(one) for one in self.collectives if one.group not in waited)
        tokens = sum(self.seconds(one) for one in self.collectives if one.group in waited)
        outside = n_blocks / (n_blocks + job.loops * job.cfg.core_layers) / self.layout.accumulate
        hidden = min(units, outside * max(compute, memory))
        return {"compute": compute, "memory bandwidth": memory, "interconnect": tokens + units - hidden}

    @cached_property
    def step_seconds(self) -> float:
        """Seconds of a step: matrix products and memory overlap; exposed communication adds to them."""
        return max(self.times["compute"], self.times["memory bandwidth"]) + self.times["interconnect"]

    @property
    def bound(self) -> str:
        """The resource that takes the longest part of a step."""
        return max(self.times, key=lambda name: self.times[name])

    @property
    def tokens_per_second(self) -> float:
        """Throughput of all GPUs together."""
        return self.job.batch_size * self.job.length / self.step_seconds


@lru_cache(maxsize=16)
def _flops(config: str, loops: int, length: int, grad_loops: int, recompute: bool) -> float:
    return flops_per_trained_token(MythosConfig.from_json(config), loops, length, grad_loops, recompute)
