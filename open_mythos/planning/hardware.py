"""GPUs and their interconnects, by their makers' data sheets; none was measured here. Imports no torch.

Rates of matrix products are dense bfloat16 with float32 accumulation, without the factor of two for sparsity; links
count one direction, half of what NVLink's data sheets print.

- A100: NVIDIA A100 data sheet (2021), SXM, 80 GB: 312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s both ways, 400 W.
- H100: NVIDIA H100 data sheet (2023), SXM: 989 TFLOP/s, 3.35 TB/s, NVLink 900 GB/s both ways, 700 W.
- H200: NVIDIA H200 data sheet (2024), SXM: the H100's processor with 141 GB at 4.8 TB/s.
- B200: NVIDIA HGX B200 data sheet (2025), 1,000 W: 2,250 TFLOP/s, 180 GB at 7.7 TB/s, NVLink 1.8 TB/s both ways.
- RTX 3090, RTX 4090: NVIDIA's Ampere GA102 and Ada white papers (2020, 2022): 71 and 165 TFLOP/s, 936 and 1,008 GB/s,
  350 and 450 W; no NVLink between more than two, so PCI Express.
- PCI Express 4.0 x16: 32 GB/s (PCI-SIG); InfiniBand NDR: 400 Gbit/s a GPU, as in DGX H100; Ethernet: 100 Gbit/s a GPU.

Latencies are of the order that NCCL's own tuning model assumes for a hop: a few microseconds, more over a network.
"""

import math
from dataclasses import dataclass

from open_mythos.fields import must, nearest


@dataclass(frozen=True)
class Device:
    """A GPU: FLOP/s of matrix products in bfloat16, bytes of memory, bytes per second of its bandwidth, link, watts."""

    flops: float
    memory: float
    bandwidth: float
    link: str
    watts: float


@dataclass(frozen=True)
class Link:
    """Bytes per second and GPU in one direction, latency in seconds, and whether it joins machines or GPUs in one."""

    rate: float
    latency: float
    joins_machines: bool


DEVICES = {
    "a100": Device(312e12, 80e9, 2.039e12, "nvlink3", 400),
    "h100": Device(989e12, 80e9, 3.35e12, "nvlink4", 700),
    "h200": Device(989e12, 141e9, 4.8e12, "nvlink4", 700),
    "b200": Device(2250e12, 180e9, 7.7e12, "nvlink5", 1000),
    "rtx3090": Device(71e12, 24e9, 0.936e12, "pcie", 350),
    "rtx4090": Device(165e12, 24e9, 1.008e12, "pcie", 450),
}
LINKS = {
    "nvlink3": Link(300e9, 3e-6, False),
    "nvlink4": Link(450e9, 3e-6, False),
    "nvlink5": Link(900e9, 3e-6, False),
    "pcie": Link(32e9, 5e-6, False),
    "infiniband": Link(50e9, 8e-6, True),
    "ethernet": Link(12.5e9, 30e-6, True),
}
BETWEEN = "infiniband"


def links(text: str, device: Device) -> tuple[Link, Link]:
    """Parse the links within and between machines from a text such as ``nvlink``, ``pcie,ethernet`` or ``25``.

    A name sets the link of its kind; the defaults are the device's own link and InfiniBand. ``nvlink`` is that of the
    device. A number is GB/s between machines; of two words the first, if a number, is GB/s within a machine.

    Raises:
        ValueError: for an unknown name, or a number that is not a rate.
    """
    found = {False: LINKS[device.link], True: LINKS[BETWEEN]}
    words = [word.strip() for word in text.split(",")] if text else []
    must(len(words) <= 2, f"--interconnect {text!r} names {len(words)} links; name one or two, as in pcie,ethernet")
    named = set[bool]()
    for place, word in enumerate(words):
        try:
            rate = float(word)
        except ValueError:
            name = device.link if word == "nvlink" else word
            known = ["nvlink", *LINKS]
            must(name in LINKS, f"--interconnect {word!r} is unknown; {nearest(word, known)} Or give GB/s, as in 25")
            must(word != "nvlink" or name != "pcie", f"--interconnect {word!r}: this GPU has none; use pcie")
            joins = LINKS[name].joins_machines
            where = "between" if joins else "within"
            must(joins not in named, f"--interconnect {text!r} names two links {where} machines; name one of each kind")
            found[joins] = LINKS[name]
        else:
            must(0 < rate < math.inf, f"--interconnect {word!r}: give GB/s above 0, as in 25")
            joins = place == 1 or len(words) == 1
            found[joins] = Link(rate * 1e9, found[joins].latency, joins)
        named.add(joins)
    return found[False], found[True]
