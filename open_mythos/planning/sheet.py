"""What a layout takes on every GPU: bytes by kind, collectives, and the time of a step with what bounds it.

Assumed of a run: every unit is gathered once a step and stays until its gradient has been reduced, once, whatever the
number of loops, of their recomputations and of micro-batches; weights, gradients and moments are float32, and what is
gathered and computed with is in the job's precision. Experts are chosen evenly.
"""

from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache

import torch

from open_mythos.config import MythosConfig
from open_mythos.diagnostics import flops_per_trained_token
from open_mythos.planning.hardware import Link
from open_mythos.planning.job import Job, Layout
from open_mythos.planning.rank import Pieces, Unit, pieces, units
from open_mythos.training.objective import MAX_LOGITS

_MASTER = 4  # bytes of a float32


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at the peak of a step, by kind."""

    parameters: float  # float32, this GPU's share
    moments: float  # of the optimizer
    average: float  # averaged weights (EMA)
    gathered: float  # whole weights of all units, in the precision that is computed with
    gradients: float  # whole ones until they are reduced, the buffer of a reduction, this GPU's share
    activations: float  # kept for the backward pass
    dispatch: float  # tokens on their way to experts of other GPUs, and back
    working: float  # what is needed for a moment

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Collective:
    """So many calls a step of one kind, in one group of GPUs.

    Attributes:
        kind: ``all_gather``, ``reduce_scatter``, ``all_reduce`` or ``all_to_all``.
        group: the axis, ``shard``, ``replicate``, ``expert`` or ``tensor``.
        of: the unit that is moved, or ``tokens``.
        count: calls a step.
        bytes: of one call, whole: what all_gather makes, what the others take, on one GPU.
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
    """Everything about a :class:`Layout` for a :class:`Job`."""

    job: Job
    layout: Layout

    @cached_property
    def units(self) -> list[Unit]:
        return units(self.job.config, self.layout.tensor, self.layout.expert)

    @cached_property
    def pieces(self) -> Pieces:
        dtype = torch.bfloat16 if self.job.number == 2 else torch.float32
        return pieces(self.job.config, self.layout.tensor, self.job.length, dtype)

    def sharers(self, unit: Unit) -> int:
        """How many GPUs share what is there of a unit."""
        return self.layout.shard // self.layout.expert if unit.is_routed else self.layout.shard

    @property
    def tokens(self) -> int:
        """Of a micro-batch, on one GPU."""
        return self.layout.rows * self.job.length

    @cached_property
    def memory(self) -> Memory:
        """Bytes of one GPU when most of it is in use: at the loss, in the loops' backward pass, or at a reduction."""
        job, layout = self.job, self.layout
        share = sum(unit.numel / self.sharers(unit) for unit in self.units)
        muon = sum(unit.n_muon / self.sharers(unit) for unit in self.units) if job.settings.optimizer == "muon" else 0
        whole = job.number * sum(unit.numel for unit in self.units)
        held = _MASTER / job.number * whole if layout.accumulate > 1 else 0.0  # summed over micro-batches, unsharded
        in_core = [unit for unit in self.units if unit.name in ("core", "experts", "root")]
        core = job.number * sum(unit.numel for unit in in_core)
        largest = max(in_core, key=lambda unit: unit.numel)
        before, loops, loop, coda = self.activations
        at_once = min(self.tokens, max(1, MAX_LOGITS // job.cfg.vocab_size)) / self.pieces.loss_tokens
        routed = sum(unit.numel for unit in self.units if unit.is_routed) / max(1, job.cfg.core_layers)
        working = self.pieces.loop.needs(layout.rows) + job.number * routed * 2 / 3
        reduction = _MASTER * (largest.numel + largest.numel / self.sharers(largest))
        loss = at_once * self.pieces.loss.kept, 0.0, at_once * self.pieces.loss.working
        moments = [  # gradients, activations, what travels, what is needed for a moment
            (held, before + loops + coda + loss[0], *loss[1:]),
            (held or core, before + loops + (loop if layout.recompute else -loop), self.dispatch_bytes, working),
            (held + (0 if held else core) + reduction, before, 0.0, 0.0),
            (held + _MASTER * share, 0.0, 0.0, 0.0),
        ]
        peak = max(moments, key=sum)
        ema = _MASTER * share if job.settings.ema else 0.0
        return Memory(_MASTER * share, _MASTER * (2 * share - muon), ema, whole, *peak)

    @cached_property
    def activations(self) -> tuple[float, float, float, float]:
        """Bytes that are kept: before the loops, of all loops, of one that keeps all, and by the coda."""
        job, rows, one = self.job, self.layout.rows, self.pieces
        loop, state = rows * one.loop.kept, self.tokens * job.cfg.dim * job.number
        before = rows * (one.ends.kept + job.cfg.prelude_layers * one.block.kept)
        loops = job.grad_loops * (state if self.layout.recompute else loop)
        return before, loops, loop, rows * job.cfg.coda_layers * one.block.kept

    @property
    def dispatch_bytes(self) -> float:
        """Of one loop: rows sent and received, and the same on the way back."""
        return 4 * self.exchanged if self.layout.expert > 1 else 0.0

    @property
    def exchanged(self) -> float:
        """Bytes that one GPU hands to an all-to-all: a row for each token and chosen expert."""
        return self.tokens * self.job.cfg.n_experts_per_tok * self.job.cfg.dim * self.job.number

    @cached_property
    def collectives(self) -> list[Collective]:
        """All of a step but those of a few bytes: norms, counts, the loss."""
        job, layout, cfg = self.job, self.layout, self.job.cfg
        found = []
        for unit in self.units:
            n, last = self.sharers(unit), _MASTER * unit.numel / self.sharers(unit)
            if n > 1:
                found.append(Collective("all_gather", "shard", unit.name, 1, job.number * unit.numel, n))
                found.append(Collective("reduce_scatter", "shard", unit.name, 1, _MASTER * unit.numel, n))
            if layout.replicate > 1:
                found.append(Collective("all_reduce", "replicate", unit.name, 1, last, layout.replicate))
        passes = job.loops + job.grad_loops * (1 + layout.recompute)  # forward, backward, recomputation
        n = layout.accumulate * cfg.core_layers * passes
        if layout.expert > 1 and cfg.n_experts:
            found.append(Collective("all_to_all", "expert", "tokens", 2 * n, self.exchanged, layout.expert))
        if layout.tensor > 1:
            blocks = 2 * layout.accumulate * (cfg.prelude_layers + cfg.coda_layers)
            size = self.tokens * cfg.dim * job.number
            found.append(Collective("all_reduce", "tensor", "tokens", 2 * (n + blocks), size, layout.tensor))
        return found

    def link(self, group: str, size: int) -> Link:
        """What joins the GPUs of a group: neighbours share tensors, then experts, then shards, then copies."""
        tensor, copy = self.layout.tensor, self.layout.tensor * self.layout.shard
        apart = {"tensor": 1, "expert": tensor, "shard": tensor, "replicate": copy}[group]
        return self.job.links[apart * size > self.job.settings.node]

    def seconds(self, one: Collective) -> float:
        """Of all calls of a collective: a latency a hop, and bytes over the link's rate (Thakur et al. 2005)."""
        link, hops = self.link(one.group, one.size), one.size - 1
        trips = 2 if one.kind == "all_reduce" else 1
        latency = link.latency * (hops.bit_length() if one.kind != "all_to_all" else min(hops, 8))
        return one.count * trips * (latency + hops / one.size * one.bytes / link.rate)

    @cached_property
    def flops(self) -> float:
        """Operations of a step on one GPU."""
        job, layout = self.job, self.layout
        each = _flops(job.config, job.loops, job.length, job.grad_loops, layout.recompute)
        return each * job.batch_size * job.length / job.gpus

    @cached_property
    def traffic(self) -> float:
        """Bytes of its memory that a GPU reads and writes in a step: weights at each use, activations, the update."""
        job, layout, one = self.job, self.layout, self.pieces
        weights = {unit.name: job.number * unit.numel for unit in self.units}
        core = weights["core"] + weights.get("experts", 0)
        passes = job.loops + job.grad_loops * (2 + layout.recompute)
        outside = sum(weights.values()) - core
        n_blocks = job.cfg.prelude_layers + job.cfg.coda_layers
        kept = layout.rows * (one.ends.kept + n_blocks * one.block.kept)
        kept += self.tokens / one.loss_tokens * one.loss.kept + layout.rows * job.grad_loops * one.loop.kept
        # written and read, and read and written once more as gradients of about the same size
        activations = 4 * kept + 2 * layout.rows * one.loop.kept * (passes - 3 * job.grad_loops)
        state = 4 if job.settings.ema else 3
        share = _MASTER * sum(unit.numel / self.sharers(unit) for unit in self.units)
        return layout.accumulate * (passes * core + 3 * outside + activations) + (2 * state + 1) * share

    @cached_property
    def times(self) -> dict[str, float]:
        """Seconds of a step that products, memory and the interconnect would take alone; of this last, what is waited
        for: units travel while prelude and coda compute, and tokens do not.
        """
        job = self.job
        compute = self.flops / (job.device.flops / (1 if job.number == 2 else 2) * job.settings.efficiency)
        memory = self.traffic / job.device.bandwidth
        units = sum(self.seconds(one) for one in self.collectives if one.of != "tokens")
        tokens = sum(self.seconds(one) for one in self.collectives if one.of == "tokens")
        outside = (job.cfg.prelude_layers + job.cfg.coda_layers) / (
            job.cfg.prelude_layers + job.cfg.coda_layers + job.loops * job.cfg.core_layers
        )
        hidden = min(units, outside * max(compute, memory) / self.layout.accumulate)
        return {"compute": compute, "memory bandwidth": memory, "interconnect": tokens + units - hidden}

    @cached_property
    def step_seconds(self) -> float:
        """Products and memory overlap; what is waited for of the interconnect does not."""
        return max(self.times["compute"], self.times["memory bandwidth"]) + self.times["interconnect"]

    @property
    def bound(self) -> str:
        """What a step takes longest for."""
        return max(self.times, key=lambda name: self.times[name])

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs."""
        return self.job.batch_size * self.job.length / self.step_seconds


@lru_cache(maxsize=16)
def _flops(config: str, loops: int, length: int, grad_loops: int, recompute: bool) -> float:
    return flops_per_trained_token(MythosConfig.from_json(config), loops, length, grad_loops, recompute)
