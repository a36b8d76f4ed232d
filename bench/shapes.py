"""Traces of models and of machines that nobody needs to have: sizes and shares of compute are given, time is not.

Every trace has one second of compute and one byte per second of bandwidth: `on` gives it those of a machine.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from litrt.trace import Segment, Trace, Use

_ALIGN_BYTES = 4096
_MB = 1_000_000


@dataclass(frozen=True)
class Machine:
    """What moves weights.

    Attributes:
        title: Its name in pictures.
        bandwidth_bps: Bytes per second.
        latency_s: Seconds that a read costs beside its bytes.
    """

    title: str
    bandwidth_bps: float
    latency_s: float = 0.0


MACHINES = {
    "object": Machine("object store, 0.5 GB/s, 30 ms", 0.5e9, 0.03),
    "disk": Machine("virtual disk, 3.4 GB/s", 3.4e9),
    "nvme": Machine("NVMe, 7 GB/s", 7e9),
    "pcie3": Machine("PCIe 3 x16, 12 GB/s", 12e9),
    "pcie4": Machine("PCIe 4 x16, 24 GB/s", 24e9),
    "pcie5": Machine("PCIe 5 x16, 50 GB/s", 50e9),
}


def made(groups: Sequence[tuple[str, Sequence[float], float]], *, together: bool = False) -> Trace:
    """Returns a trace that uses tensors one after the other, or those of a group together.

    Args:
        groups: Of each its name, the bytes of its tensors, and its share of the compute.
        together: One use per group.
    """
    segments: list[Segment] = []
    uses = []
    total = sum(share for _, _, share in groups)
    for name, sizes, share in groups:
        first = len(segments)
        for number, n_bytes in enumerate(sizes):
            size_bytes = math.ceil(n_bytes / _ALIGN_BYTES) * _ALIGN_BYTES
            segments.append(Segment(f"{name}.w{number}", int(n_bytes), size_bytes, _ALIGN_BYTES))
        indices = range(first, len(segments))
        if together:
            uses.append(Use(tuple(indices), share / total))
        else:
            uses += [Use((i,), share / total * segments[i].nbytes / sum(map(int, sizes))) for i in indices]
    return Trace(tuple(segments), tuple(uses), 1.0)


def _transformer(width: int, layer: Sequence[int], n_layers: int, vocabulary: int) -> Trace:
    """Returns a decoder in 16 bits: one token, where compute goes with bytes, and the embedding is a look-up."""
    sizes = [2.0 * n for n in layer]
    table = 2.0 * vocabulary * width
    groups: list[tuple[str, Sequence[float], float]] = [("embed", [table], 0.005 * table)]
    groups += [(f"layers.{number}", sizes, sum(sizes)) for number in range(n_layers)]
    return made([*groups, ("head", [table], table)])


def llama8b() -> Trace:
    """Returns Llama-3-8B: q, k, v, o, gate, up and down in each of 32 layers."""
    width, inner = 4096, 14_336
    attention = [width * width, width * width // 4, width * width // 4, width * width]
    return _transformer(width, [*attention, *[width * inner] * 3], 32, 128_256)


def gptj() -> Trace:
    """Returns GPT-J: q, k, v, out and two feed-forward matrices in each of 28 layers."""
    width = 4096
    return _transformer(width, [*[width * width] * 4, *[4 * width * width] * 2], 28, 50_400)


def uniform(n: int = 32) -> Trace:
    """Returns equal blocks of equal compute."""
    sizes = [size * _MB for size in (8.0, 2.0, 2.0, 8.0, 27.0, 27.0, 27.0)]
    return made([(f"layers.{number}", sizes, 1.0) for number in range(n)], together=True)


def scattered(n: int = 40, seed: int = 0) -> Trace:
    """Returns blocks of random sizes, and of compute that goes with them loosely."""
    draw = random.Random(seed)
    groups = []
    for number in range(n):
        n_bytes = 100 * _MB * draw.lognormvariate(0, 0.8)
        parts = [draw.gammavariate(3, 1) for _ in range(6)]
        sizes = [n_bytes * part / sum(parts) for part in parts]
        groups.append((f"layers.{number}", sizes, n_bytes * draw.lognormvariate(0, 0.7)))
    return made(groups, together=True)


def convnet(n: int = 32) -> Trace:
    """Returns a convolutional network: first small weights and much compute, at last the opposite."""
    groups = []
    for number in range(n):
        x = number / (n - 1)
        groups.append((f"layers.{number}", [5 * _MB * math.exp(4 * x) / 4] * 4, math.exp(-2.5 * x)))
    return made(groups, together=True)


SHAPES: dict[str, Callable[[], Trace]] = {
    "llama8b": llama8b,
    "gptj": gptj,
    "uniform": uniform,
    "random": scattered,
    "convnet": convnet,
}


def on(trace: Trace, machine: Machine, compute_s: float) -> Trace:
    """Returns a trace as it is on a machine, with so many seconds of compute per pass."""
    factor = compute_s / trace.compute_s if trace.compute_s else 0.0
    uses = tuple(
        replace(
            use,
            compute_s=use.compute_s * factor,
            held_s=None if use.held_s is None else use.held_s * factor,
        )
        for use in trace.uses
    )
    return Trace(trace.segments, uses, machine.bandwidth_bps, machine.latency_s)
