"""The input of a plan: a model, its training, its GPUs, and how these divide it. Imports no torch."""

from dataclasses import dataclass, field, replace
from functools import cached_property

from open_mythos.config import MythosConfig
from open_mythos.fields import Checked, choice, flag, must, part, real, size
from open_mythos.planning.hardware import DEVICES, Device, Link, links

MOST_GPUS = 1_000_000
ROW = 4096  # default tokens of a row, if max_seq_len is not below it
SMALL, BATCH_SMALL, BATCH = 3e9, 2**19, 2**22  # default tokens of a step: for models below SMALL parameters, and others


@dataclass
class Degrees(Checked):
    """Degrees of parallelism; 0: searched for. ``replicate * shard * tensor`` is the number of GPUs."""

    replicate: int = size(0, minimum=0)  # copies of the model, over which gradients are summed
    shard: int = size(0, minimum=0)  # GPUs that divide parameters, gradients and optimizer state (FSDP)
    expert: int = size(0, minimum=0)  # GPUs that hold different experts, and exchange tokens
    tensor: int = size(0, minimum=0)  # GPUs that divide each feed-forward, and compute the same tokens


@dataclass
class Settings(Checked):
    """Training and hardware of a plan; 0 or "": the value of the model, of the device, or a usual one."""

    device: str = choice("h100", *DEVICES)
    node: int = size(8)  # GPUs of a machine
    parallel: Degrees = part(Degrees)
    batch_size: int = size(0, minimum=0)  # sequences of one optimizer step
    length: int = size(0, minimum=0)  # tokens of a sequence
    loops: int = size(0, minimum=0)
    grad_loops: int = size(0, minimum=0)  # how many of them, the last ones, have gradient; 0: all
    checkpoint_loops: str = choice("", "", "true", "false")  # recompute each loop; "": searched for
    optimizer: str = choice("adamw", "adamw", "muon")
    ema: bool = flag(True)  # whether averaged weights are kept
    precision: str = choice("bf16", "bf16", "fp32")
    efficiency: float = real(0.5, 0.0, 1.0, low_open=True)  # share of the peak that matrix products reach
    usable: float = real(0.92, 0.0, 1.0, low_open=True)  # share of memory left by context, libraries, fragmentation
    tflops: float = real(0.0, 0.0)  # peak of one GPU; 0: the data sheet's
    bandwidth: float = real(0.0, 0.0)  # of its memory, in GB/s
    watts: float = real(0.0, 0.0)


@dataclass(frozen=True)
class Layout:
    """A way to divide a model and its batch over GPUs.

    Attributes:
        replicate, shard, expert, tensor: see :class:`Degrees`.
        rows: sequences in a micro-batch of one GPU.
        accumulate: micro-batches of a step.
        recompute: whether loops are recomputed in the backward pass.
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
        """GPUs over which FSDP divides the same experts; above 1 if ``expert`` is less than ``shard``."""
        return max(1, self.shard // self.expert)

    @property
    def copies(self) -> int:
        """GPUs that hold the same part of the experts, not counting those of a tensor group."""
        return self.replicate * self.shard // self.slices // self.expert

    @property
    def settings(self) -> list[str]:
        """Overrides for ``mythos train``."""
        degrees = [f"parallel.{name}={getattr(self, name)}" for name in ("replicate", "shard", "expert", "tensor")]
        return [*degrees, f"accumulate={self.accumulate}", f"checkpoint_loops={str(self.recompute).lower()}"]


@dataclass(frozen=True)
class Job:
    """A training job to plan: model, GPUs and settings.

    Attributes:
        cfg: of the model.
        gpus, memory: number of GPUs, and bytes of each; 0: the device's own.
        settings: the rest; :attr:`loops` and similar properties resolve a 0.
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
        must(self.memory >= 0, f"--memory {self.memory / 1e9:g}: give the memory of one GPU in GB, above 0")
        given, most = self.settings.grad_loops, self.loops
        must(given <= most, f"grad_loops={given} is more than loops={most}; use 1 to {most}, or 0 for all")
        n, longest = self.length, self.cfg.max_seq_len
        must(n <= longest, f"length={n} is more than model.max_seq_len={longest}; use {longest} or less")
        self.links  # noqa: B018  raises

    @cached_property
    def config(self) -> str:
        """Config of the model as JSON, which is hashable for caches."""
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
        """Links within a machine, and between machines."""
        return links(self.interconnect, self.device)

    @property
    def room(self) -> float:
        """Bytes of a GPU's memory that training may use."""
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
        """Bytes of a number in the precision of computation."""
        return 2 if self.is_bf16 else 4

    @property
    def batch_size(self) -> int:
        """Sequences of a step: as set, or about a usual number of tokens, divisible by the GPUs."""
        if self.settings.batch_size:
            return self.settings.batch_size
        tokens = BATCH_SMALL if self.n_parameters < SMALL else BATCH
        return max(1, round(tokens / self.length / self.gpus)) * self.gpus
