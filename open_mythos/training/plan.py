"""The runs of a comparison of a looped model with baselines, and their directories."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from open_mythos.fields import must
from open_mythos.training import baselines, runs
from open_mythos.training.config import ONE_PASS, UNTIED, TrainConfig
from open_mythos.training.cost import flops_per_step
from open_mythos.training.fit import Watch, fit

KINDS = ("looped", *ONE_PASS, *UNTIED)
Watching = Callable[[TrainConfig], AbstractContextManager[Watch]]


@dataclass
class Plan:
    """The runs that :func:`compare` needs.

    Attributes:
        cfg: common to all runs, apart from ``kind``, ``seed`` and learning rates, which :meth:`of` sets.
        out, seeds, rates: as of :func:`compare`; without rates, that of ``cfg`` is the only one.

    Raises:
        ValueError: for no seeds, a seed or rate given twice or out of range, a ``start`` or ``optim.only``, or a kind
            that cannot be built.
    """

    cfg: TrainConfig
    out: Path
    seeds: Sequence[int] = (0, 1, 2)
    rates: Sequence[float] = ()

    def __post_init__(self) -> None:
        must(len(self.seeds) > 0, "no seeds to compare over; give at least one")
        self.rates = self.rates or (self.cfg.optim.lr,)
        for name, values in (("seeds", self.seeds), ("rates", self.rates)):
            must(len(set(values)) == len(values), f"{name} {', '.join(map(str, values))}: give each value only once")
        start = self.cfg.start
        must(not start, f"start={start!r}: a comparison trains all kinds from new weights; leave it out")
        only = self.cfg.optim.only
        must(not only, f"optim.only={only!r}: a comparison trains all weights of each kind; leave it out")
        loops = sorted({*self.cfg.evaluation.loops, self.cfg.loops.trained, self.cfg.loops.maximum})
        self.cfg = dataclasses.replace(self.cfg, evaluation=dataclasses.replace(self.cfg.evaluation, loops=loops))
        for kind in KINDS:
            for rate in self.rates:
                baselines.counted(self.of(kind, self.seeds[0], rate))

    @property
    def n_runs(self) -> int:
        """Number of runs: every rate on the first seed, then the best one on the other seeds, for each kind."""
        return len(KINDS) * (len(self.rates) + len(self.seeds) - 1)

    def of(self, kind: str, seed: int, rate: float) -> TrainConfig:
        """The config of a run; Muon's learning rate scales with AdamW's."""
        optim = self.cfg.optim
        if rate != optim.lr:
            optim = dataclasses.replace(optim, lr=rate, muon_lr=optim.muon_lr * rate / optim.lr)
        return dataclasses.replace(self.cfg, kind=kind, seed=seed, optim=optim)

    def run(self, kind: str, seed: int, rate: float) -> Path:
        """Directory of a run: OUT/KIND-seedN, or OUT/KIND-lrRATE-seedN at a rate that is not the recipe's."""
        return self.out / f"{kind}{'' if rate == self.cfg.optim.lr else f'-lr{rate:g}'}-seed{seed}"

    def is_done(self, kind: str, seed: int, rate: float) -> bool:
        """Whether a run has ended, with the same settings."""
        run = self.run(kind, seed, rate)
        return (run / runs.EVALUATION).is_file() and TrainConfig.load(run / runs.RUN_CONFIG) == self.of(
            kind, seed, rate
        )

    def describe(self) -> str:
        """How many runs there will be, in one line."""
        n_kinds, first, others = len(KINDS), self.seeds[0], len(self.seeds) - 1
        done = sum(self.is_done(kind, first, rate) for kind in KINDS for rate in self.rates)
        how = f"{n_kinds} kinds × {len(self.seeds)} seeds"
        if len(self.rates) > 1:
            how = f"{n_kinds} kinds × ({len(self.rates)} rates on seed {first} + {others} more seeds at the best)"
        elif others:
            done += sum(self.is_done(kind, seed, self.rates[0]) for kind in KINDS for seed in self.seeds[1:])
        flops = {kind: self.cfg.steps * flops_per_step(self.of(kind, first, self.rates[0])) for kind in KINDS}
        total = sum(flops.values()) * self.n_runs / n_kinds
        return f"{self.n_runs} runs: {how}; {total:.2g} FLOPs to train" + (f"; {done} are done" if done else "")

    def trained(self, kind: str, seed: int, rate: float, watching: Watching) -> Path:
        """The directory of a run, which is trained or resumed first unless it is done."""
        cfg, run = self.of(kind, seed, rate), self.run(kind, seed, rate)
        if not self.is_done(kind, seed, rate):
            with watching(cfg) as watch:
                watch.log(f"{kind} model, seed {seed}, lr {rate:g}: {run}")
                fit(cfg, run, "auto" if (run / runs.RUN_CONFIG).exists() else "never", watch)
        return run
