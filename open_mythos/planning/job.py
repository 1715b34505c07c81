"""What is to be planned: a model, how it is trained, on what, and how GPUs share it. Imports no torch."""

from dataclasses import dataclass, field, replace
from functools import cached_property

from open_mythos.config import MythosConfig
from open_mythos.fields import Checked, choice, flag, must, part, real, size
from open_mythos.planning.hardware import DEVICES, Device, Link, links

MOST_GPUS = 1_000_000
ROW = 4096  # tokens of a row, unless the model reads fewer or other numbers are asked for
SMALL, BATCH_SMALL, BATCH = 3e9, 2**19, 2**22  # tokens of a step, of models below so many parameters and of others


@dataclass
class Degrees(Checked):
    """How many GPUs share what; 0: searched for. ``replicate * shard * tensor`` are all GPUs."""

    replicate: int = size(0, minimum=0)  # copies of the model, over which gradients are summed
    shard: int = size(0, minimum=0)  # GPUs that share parameters, gradients and optimizer state (FSDP)
    expert: int = size(0, minimum=0)  # GPUs that keep different experts, and exchange tokens
    tensor: int = size(0, minimum=0)  # GPUs that share each feed-forward, and compute the same tokens


@dataclass
class Settings(Checked):
    """How it is trained, and on what; 0 or "": the model's own, the device's own, or the usual."""

    device: str = choice("h100", *DEVICES)
    node: int = size(8)  # GPUs of a machine
    parallel: Degrees = part(Degrees)
    batch_size: int = size(0, minimum=0)  # sequences of one optimizer step
    length: int = size(0, minimum=0)  # tokens of a sequence
    loops: int = size(0, minimum=0)
    grad_loops: int = size(0, minimum=0)  # how many of them, the last ones, have gradient; all
    checkpoint_loops: str = choice("", "", "true", "false")  # recompute each loop; searched for
    optimizer: str = choice("adamw", "adamw", "muon")
    ema: bool = flag(True)  # whether averaged weights are kept
    precision: str = choice("bf16", "bf16", "fp32")
    efficiency: float = real(0.5, 0.0, 1.0, low_open=True)  # share of the peak that matrix products reach
    usable: float = real(0.92, 0.0, 1.0, low_open=True)  # share of memory for us: context, libraries, fragmentation
    tflops: float = real(0.0, 0.0)  # of one GPU, in place of the catalogue's
    bandwidth: float = real(0.0, 0.0)  # of its memory, in GB/s
    watts: float = real(0.0, 0.0)


@dataclass(frozen=True)
class Layout:
    """Who shares what, and how a step is divided.

    Attributes:
        replicate, shard, expert, tensor: see :class:`Degrees`.
        rows: sequences of a micro-batch of one GPU.
        accumulate: micro-batches of a step.
        recompute: whether loops are computed again in the backward pass.
    """

    replicate: int = 1
    shard: int = 1
    expert: int = 1
    tensor: int = 1
    rows: int = 1
    accumulate: int = 1
    recompute: bool = False

    @property
    def gpus(self) -> int:
        return self.replicate * self.shard * self.tensor

    @property
    def slices(self) -> int:
        """GPUs that share the same experts, where fewer share experts than share the rest."""
        return max(1, self.shard // self.expert)

    @property
    def copies(self) -> int:
        """GPUs that hold the same of the experts, besides a tensor group."""
        return self.replicate * self.shard // self.slices // self.expert

    @property
    def settings(self) -> list[str]:
        """What to type after ``mythos train``."""
        degrees = [f"parallel.{name}={getattr(self, name)}" for name in ("replicate", "shard", "expert", "tensor")]
        return [*degrees, f"accumulate={self.accumulate}", f"checkpoint_loops={str(self.recompute).lower()}"]


@dataclass(frozen=True)
class Job:
    """What is trained, on what.

    Attributes:
        cfg: of the model.
        gpus, memory: how many, and bytes of each.
        settings: the rest, with 0 where :attr:`loops` and the like say what it means.
        interconnect: see :func:`~open_mythos.planning.hardware.links`.
        n_parameters: of the model.
    """

    cfg: MythosConfig
    gpus: int
    settings: Settings = field(default_factory=Settings)
    memory: float = 0.0
    interconnect: str = ""
    n_parameters: int = 0

    def __post_init__(self) -> None:
        must(1 <= self.gpus <= MOST_GPUS, f"--gpus {self.gpus}; give 1 to {MOST_GPUS:,}")
        must(self.memory >= 0, f"--memory {self.memory / 1e9:g}: give the GB of one GPU, above 0")
        given, most = self.settings.grad_loops, self.loops
        must(given <= most, f"grad_loops={given} of loops={most}; use 1 to {most}, or 0 for all")
        n, longest = self.length, self.cfg.max_seq_len
        must(n <= longest, f"length={n} is more than model.max_seq_len={longest}; use {longest} or less")
        self.links  # noqa: B018  raises

    @cached_property
    def config(self) -> str:
        """Of the model, as JSON, which can be looked up by."""
        return self.cfg.to_json()

    @cached_property
    def device(self) -> Device:
        known, own = DEVICES[self.settings.device], self.settings
        return replace(
            known,
            flops=1e12 * own.tflops or known.flops,
            bandwidth=1e9 * own.bandwidth or known.bandwidth,
            memory=self.memory or known.memory,
            watts=own.watts or known.watts,
        )

    @cached_property
    def links(self) -> tuple[Link, Link]:
        """Inside of a machine, and between machines."""
        return links(self.interconnect, self.device)

    @property
    def room(self) -> float:
        """Bytes of a GPU that training may fill."""
        return self.device.memory * self.settings.usable

    @property
    def length(self) -> int:
        return self.settings.length or min(ROW, self.cfg.max_seq_len)

    @property
    def loops(self) -> int:
        return self.settings.loops or self.cfg.max_loop_iters

    @property
    def grad_loops(self) -> int:
        return self.settings.grad_loops or self.loops

    @property
    def is_bf16(self) -> bool:
        return self.settings.precision == "bf16"

    @property
    def number(self) -> int:
        """Bytes of a number that is computed with."""
        return 2 if self.is_bf16 else 4

    @property
    def batch_size(self) -> int:
        """Sequences of a step: as asked, or about as many tokens as are usual, divisible by the GPUs."""
        if self.settings.batch_size:
            return self.settings.batch_size
        tokens = BATCH_SMALL if self.n_parameters < SMALL else BATCH
        return max(1, round(tokens / self.length / self.gpus)) * self.gpus
