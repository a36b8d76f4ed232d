"""Whether weights are worth compressing, and how: from what they, the processor and the disk say when asked.

Blosc cuts a chunk into blocks, and groups bits or bytes of the same significance before it compresses them: of a
trained weight only the exponent can be compressed.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numcodecs import blosc
from zarr.codecs import BloscCodec

from litrt.crc import Bytes
from litrt.store import ALIGN_BYTES, dtype_name
from litrt.units import format_bytes

CODECS = ("lz4", "zstd")
"""Codecs that a store can be compressed with."""

SAMPLE_BYTES = 1 << 20
"""What is taken of a tensor, at its start, in its middle and at its end, to see how well it compresses."""

CHUNK_BYTES = 8 << 20
"""A compressed chunk passes through scratch, of which every thread that reads has its own."""

_LEAST_GAIN = 1.05
"""The ratio, and the gain in speed, below which nothing is compressed."""

_PROBE_BYTES = 128 << 20
_PROBE_REQUEST_BYTES = 16 << 20
_PROBE_THREADS = 2


@dataclass(frozen=True)
class _Settings:
    level: int
    shuffle: str
    block_bytes: int  # 0: what Blosc chooses


# On trained weights, measured by bench/compression.py. zstd at higher levels, or in smaller blocks, which Blosc
# chooses, takes up to ten times as long to encode, decodes at half the speed, and has a ratio that is not better.
_SETTINGS = {"lz4": _Settings(5, "bitshuffle", 0), "zstd": _Settings(1, "shuffle", 512 << 10)}
_SHUFFLES = {"shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}


def blosc_codec(codec: str, itemsize: int) -> BloscCodec:
    """Returns the codec of Zarr that `codec` stands for, for values of `itemsize` bytes."""
    chosen = _SETTINGS[codec]
    return BloscCodec(
        typesize=itemsize,
        cname=codec,  # type: ignore[arg-type]
        clevel=chosen.level,
        shuffle=chosen.shuffle,  # type: ignore[arg-type]
        blocksize=chosen.block_bytes,
    )


def encode(values: Bytes, codec: str, itemsize: int) -> bytes:
    """Returns the Blosc buffer that `blosc_codec` makes of a chunk of `values`."""
    chosen = _SETTINGS[codec]
    shuffle = _SHUFFLES[chosen.shuffle]
    return bytes(blosc.compress(values, codec.encode(), chosen.level, shuffle, chosen.block_bytes, itemsize))


@dataclass(frozen=True)
class Measured:
    """What a codec does to values of a dtype.

    Attributes:
        codec: One of `CODECS`.
        ratio: Bytes of the values for each byte that is stored.
        decode_bps: Bytes of values per second that one thread decodes.
    """

    codec: str
    ratio: float
    decode_bps: float

    def read_bps(self, disk_bps: float, n_threads: int) -> float:
        """Returns the bytes of values per second that a disk delivers to threads that decode."""
        return min(self.ratio * disk_bps, n_threads * self.decode_bps)


def measure(samples: Sequence[Bytes], codec: str, itemsize: int) -> Measured:
    """Returns what `codec` does to `samples`."""
    buffers = [encode(values, codec, itemsize) for values in samples]
    dest = np.empty(max(map(len, samples)), dtype=np.uint8)
    seconds = []
    for _ in range(3):
        began_s = time.perf_counter()
        for values, buffer in zip(samples, buffers, strict=True):
            blosc.decompress(buffer, dest[: len(values)])
        seconds.append(time.perf_counter() - began_s)
    n_bytes = sum(map(len, samples))
    return Measured(codec, n_bytes / sum(map(len, buffers)), n_bytes / max(min(seconds), 1e-9))


def choose(measured: Sequence[Measured], disk_bps: float, n_threads: int) -> Measured | None:
    """Returns the codec with which values are read fastest, or None where none gains 5 % on no codec."""
    best = max(measured, key=lambda found: found.read_bps(disk_bps, n_threads))
    return best if best.read_bps(disk_bps, n_threads) >= _LEAST_GAIN * disk_bps else None


def gains(samples: Sequence[Bytes], nbytes: int, codec: str, itemsize: int) -> bool:
    """Says whether a tensor of `nbytes` gets smaller by 5 % and by a block of the disk, judged by `samples`."""
    n_bytes = sum(map(len, samples))
    ratio = n_bytes / sum(len(encode(values, codec, itemsize)) for values in samples)
    return ratio >= _LEAST_GAIN and nbytes - nbytes / ratio >= ALIGN_BYTES


def decode_threads() -> int:
    """Returns how many threads may decode at once: half of the processors, the others being left to the model."""
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(n_cpus // 2, 1)


def disk_bps(directory: Path) -> float:
    """Returns the bytes per second of reading from the disk of `directory`, past the page cache.

    Raises:
        OSError: If a file cannot be written there, or its file system has no direct reads.
    """
    file = directory / "probe"
    try:
        with open(file, "wb") as probe:
            block = np.random.default_rng(0).bytes(_PROBE_REQUEST_BYTES)
            for number in range(_PROBE_BYTES // _PROBE_REQUEST_BYTES):
                probe.write(number.to_bytes(8, "little") + block[8:])
            probe.flush()
            os.fsync(probe.fileno())
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        try:
            return _read_bps(fd)
        finally:
            os.close(fd)
    finally:
        file.unlink(missing_ok=True)


def _read_bps(fd: int) -> float:
    offsets = range(0, _PROBE_BYTES, _PROBE_REQUEST_BYTES)

    def read(number: int) -> int:
        buffer = memory[number]
        return sum(os.preadv(fd, [buffer], offset) for offset in offsets[number::_PROBE_THREADS])

    memory = [mmap.mmap(-1, _PROBE_REQUEST_BYTES) for _ in range(_PROBE_THREADS)]
    for buffer in memory:
        buffer.write(bytes(_PROBE_REQUEST_BYTES))  # so that pages are there before the clock starts
    with ThreadPoolExecutor(_PROBE_THREADS) as pool:
        began_s = time.perf_counter()
        n_bytes = sum(pool.map(read, range(_PROBE_THREADS)))
        return n_bytes / max(time.perf_counter() - began_s, 1e-9)


class Compression:
    """The choice of a codec for each tensor of one conversion.

    Args:
        asked: None, one of `CODECS`, or "auto".
        directory: On the disk of the store.
    """

    def __init__(self, asked: str | None, directory: Path) -> None:
        self.asked = asked
        self._directory = directory
        self._n_threads = decode_threads()
        self._disk_bps: float | None = None
        self._refusal: str | None = None
        self._chosen: dict[torch.dtype, tuple[str | None, list[Measured]]] = {}

    def codec(self, samples: Sequence[Bytes], nbytes: int, dtype: torch.dtype) -> str | None:
        """Returns the codec for a tensor of `nbytes` of which there are `samples`, or None to store it as it is."""
        codec = self.asked
        if codec == "auto":
            if dtype not in self._chosen and nbytes >= SAMPLE_BYTES:
                self._chosen[dtype] = self._choose(samples, dtype)
            codec, _ = self._chosen.get(dtype, (None, []))
        return codec if codec is not None and samples and gains(samples, nbytes, codec, dtype.itemsize) else None

    def _choose(self, samples: Sequence[Bytes], dtype: torch.dtype) -> tuple[str | None, list[Measured]]:
        if self._disk_bps is None and self._refusal is None:
            try:
                self._disk_bps = disk_bps(self._directory)
            except (OSError, AttributeError) as error:
                self._refusal = f"the disk cannot be measured ({error})"
        measured = [measure(samples, codec, dtype.itemsize) for codec in CODECS]
        if self._disk_bps is None:
            return None, measured
        found = choose(measured, self._disk_bps, self._n_threads)
        return found.codec if found is not None else None, measured

    def attributes(self, nbytes: int, stored_bytes: int) -> dict[str, Any]:
        """Returns what was asked, measured and decided, as the attributes of the store keep it."""
        found: dict[str, Any] = {"asked": self.asked, "nbytes": nbytes, "stored_bytes": stored_bytes}
        if self.asked == "auto":
            found |= {"disk_bps": self._disk_bps, "n_threads": self._n_threads, "refusal": self._refusal}
            found["dtypes"] = {
                dtype_name(dtype): {
                    "codec": codec,
                    "measured": [
                        asdict(one) | {"break_even_bps": self._n_threads * one.decode_bps} for one in measured
                    ],
                }
                for dtype, (codec, measured) in self._chosen.items()
            }
        return found


def report(attributes: dict[str, Any]) -> list[str]:
    """Returns lines that say what `Compression.attributes` holds."""
    ratio = attributes["nbytes"] / max(attributes["stored_bytes"], 1)
    stored = format_bytes(attributes["stored_bytes"])
    lines = [f"compress={attributes['asked']}: {format_bytes(attributes['nbytes'])} in {stored}, ratio {ratio:.2f}"]
    if attributes.get("refusal"):
        lines.append(f"stored as it is: {attributes['refusal']}")
    for dtype, chosen in attributes.get("dtypes", {}).items():
        for one in chosen["measured"]:
            verdict = "chosen" if one["codec"] == chosen["codec"] else "not chosen"
            disk_bps = attributes["disk_bps"]
            disk = "" if disk_bps is None else f", and this one reads {_gbps(disk_bps)}"
            lines.append(
                f"{dtype} {one['codec']}, {verdict}: ratio {one['ratio']:.2f}, a thread decodes "
                f"{_gbps(one['decode_bps'])}; {attributes['n_threads']} of them keep up with disks below "
                f"{_gbps(one['break_even_bps'])}{disk}"
            )
    return lines


def _gbps(bps: float) -> str:
    return f"{format_bytes(int(bps))}/s"
