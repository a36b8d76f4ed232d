"""Whether weights are worth compressing, and how: from what they, the processor and the disk say when asked.

Blosc cuts a chunk into blocks, and groups bits or bytes of the same significance before it compresses them: of a
trained weight only the exponent can be compressed.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from numcodecs import blosc
from zarr.codecs import BloscCodec

from litrt.arrays import ALIGN_BYTES, dtype_name
from litrt.crc import CRC_BYTES, Bytes, extend_crc
from litrt.directio import O_DIRECT
from litrt.reader import Reader
from litrt.store import Store
from litrt.tensors import TensorInfo
from litrt.tune import Tuning, read_bps
from litrt.units import format_bytes

CODECS = ("lz4", "zstd")
"""Codecs that a store can be compressed with."""

SAMPLE_BYTES = 1 << 20
"""What is taken of a tensor, at its start, in its middle and at its end, to see how well it compresses."""

CHUNK_BYTES = 8 << 20
"""A compressed chunk passes through scratch, of which every thread that reads has its own."""

_LEAST_GAIN = 1.05
"""The ratio, and the gain in speed, below which nothing is compressed."""

_PROBE_CHUNKS = 12
_PROBE_ROUNDS = 3


@dataclass(frozen=True)
class _Settings:
    level: int
    shuffle: str
    block_bytes: int  # 0: what Blosc chooses


# On trained weights, measured by bench/compression.py. zstd at higher levels, or in smaller blocks, which Blosc
# chooses, takes up to ten times as long to encode, decodes at half the speed, and has a ratio that is not better.
SETTINGS = {"lz4": _Settings(5, "bitshuffle", 0), "zstd": _Settings(1, "shuffle", 512 << 10)}
_SHUFFLES = {"shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}


def blosc_codec(codec: str, itemsize: int) -> BloscCodec:
    """Returns the codec of Zarr that `codec` stands for, for values of `itemsize` bytes."""
    chosen = SETTINGS[codec]
    return BloscCodec(
        typesize=itemsize,
        cname=codec,  # type: ignore[arg-type]
        clevel=chosen.level,
        shuffle=chosen.shuffle,  # type: ignore[arg-type]
        blocksize=chosen.block_bytes,
    )


def encode(values: Bytes, codec: str, itemsize: int) -> bytes:
    """Returns the Blosc buffer that `blosc_codec` makes of a chunk of `values`."""
    chosen = SETTINGS[codec]
    shuffle = _SHUFFLES[chosen.shuffle]
    return bytes(blosc.compress(values, codec.encode(), chosen.level, shuffle, chosen.block_bytes, itemsize))


@dataclass(frozen=True)
class Measured:
    """What a codec does to values of a dtype.

    Attributes:
        codec: One of `CODECS`.
        ratio: Bytes of values for each byte that is stored.
        decode_bps: Bytes of values per second that one thread decodes, while nothing else runs.
        read_bps: Bytes of values per second that several threads read from the disk, check and decode.
    """

    codec: str
    ratio: float
    decode_bps: float
    read_bps: float

    def break_even_bps(self, disk_bps: float, n_threads: int) -> float:
        """Returns about how fast a disk may be for the codec to win on it.

        All threads together decode no faster than they do when they do nothing else; and what was read on a disk of
        `disk_bps` was slower than its bytes alone explain by the time that decoding takes from reading, on any disk.
        """
        most_bps = n_threads * self.decode_bps
        decode_s = self._decode_s(disk_bps)
        return min(most_bps, (1 - 1 / self.ratio) / decode_s) if decode_s > 0 else most_bps

    def at(self, ratio: float, disk_bps: float) -> Measured:
        """Returns what the codec does to values that have another ratio, and decode as fast."""
        read_bps = 1 / (1 / (ratio * disk_bps) + max(self._decode_s(disk_bps), 0.0))
        return replace(self, ratio=ratio, read_bps=read_bps)

    def _decode_s(self, disk_bps: float) -> float:
        """Returns the seconds for each byte of values by which reading took longer than its bytes on the disk do."""
        return 1 / self.read_bps - 1 / (self.ratio * disk_bps)


def choose(measured: Sequence[Measured], disk_bps: float) -> Measured | None:
    """Returns the codec with which values are read fastest, or None where none gains 5 % on `disk_bps`."""
    best = max(measured, key=lambda found: found.read_bps)
    return best if best.read_bps >= _LEAST_GAIN * disk_bps else None


def ratio(samples: Sequence[Bytes], codec: str, itemsize: int) -> float:
    """Returns the bytes of `samples` for each byte that `codec` makes of them."""
    return sum(map(len, samples)) / sum(len(encode(values, codec, itemsize)) for values in samples)


def gains(nbytes: int, ratio: float) -> bool:
    """Says whether a tensor of `nbytes` gets smaller by 5 % and by a block of the disk."""
    return ratio >= _LEAST_GAIN and nbytes - nbytes / ratio >= ALIGN_BYTES


def n_processors() -> int:
    """Returns how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def probe(samples: Sequence[Bytes], itemsize: int, directory: Path) -> tuple[float, list[Measured]]:
    """Measures the codecs on `samples`, and on the disk of `directory`, where it needs some 300 MB for a moment.

    Chunks of the samples are written as a store has them, and read as a runtime reads them, in turn: what decoding
    takes from reading depends on the machine, and shows in no measurement of either alone.

    Returns:
        Bytes per second that uncompressed values are read with, and what was measured of each codec.

    Raises:
        OSError: If nothing can be written there, or its file system has no direct reads.
    """
    values = np.resize(np.concatenate(samples), CHUNK_BYTES)
    root = directory / "(probe)"  # no array of a store has parentheses in its name
    try:
        buffers = {codec: encode(values, codec, itemsize) for codec in CODECS}
        infos = {"raw": _write_probe(root, "raw", values.tobytes(), packed=False)}
        infos |= {codec: _write_probe(root, codec, buffer, packed=True) for codec, buffer in buffers.items()}
        _check_direct(root / "raw/c/0/0")
        bps = _read_probe(root, infos)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    measured = [
        Measured(codec, len(values) / len(buffer), _decode_bps(buffer, len(values)), bps[codec])
        for codec, buffer in buffers.items()
    ]
    return bps["raw"], measured


def _write_probe(root: Path, name: str, content: bytes, *, packed: bool) -> TensorInfo:
    checksum = extend_crc(0, np.frombuffer(content, dtype=np.uint8)).to_bytes(CRC_BYTES, "little")
    for number in range(_PROBE_CHUNKS):
        file = root / name / "c" / str(number) / "0"
        file.parent.mkdir(parents=True)
        with open(file, "wb") as chunk:
            chunk.write(content)
            chunk.write(checksum)
            chunk.flush()
            os.fsync(chunk.fileno())
    shape = (_PROBE_CHUNKS, CHUNK_BYTES)
    nbytes = _PROBE_CHUNKS * CHUNK_BYTES
    return TensorInfo(name, shape, torch.uint8, nbytes, name, 1, not packed, CHUNK_BYTES, packed=packed)


def _check_direct(file: Path) -> None:
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | O_DIRECT)
    try:
        if not O_DIRECT:
            raise OSError(errno.EINVAL, "this system has no direct reads")
        os.preadv(fd, [mmap.mmap(-1, ALIGN_BYTES)], 0)
    finally:
        os.close(fd)


def _read_probe(root: Path, infos: dict[str, TensorInfo]) -> dict[str, float]:
    """Returns the bytes of values per second of reading each, the best of a few rounds."""
    tuning = Tuning(min(n_processors() + 1, 8), 2)

    def no_group() -> zarr.Group:
        raise AssertionError("these chunks need no zarr-python")

    reader = Reader(Store(str(root), infos, infos, {}, root=str(root), open_group=no_group))
    best = dict.fromkeys(infos, 0.0)
    for _ in range(_PROBE_ROUNDS):
        for name in infos:
            best[name] = max(best[name], read_bps(reader, reader.pieces(name), tuning))
    return best


def _decode_bps(buffer: bytes, n_bytes: int) -> float:
    dest = np.zeros(n_bytes, dtype=np.uint8)
    seconds = []
    for _ in range(3):
        began_s = time.perf_counter()
        blosc.decompress(buffer, dest)
        seconds.append(time.perf_counter() - began_s)
    return n_bytes / max(min(seconds), 1e-9)


class Compression:
    """The choice of a codec for each tensor of one conversion.

    Args:
        asked: None, one of `CODECS`, or "auto".
        directory: On the disk of the store.
    """

    def __init__(self, asked: str | None, directory: Path) -> None:
        self.asked = asked
        self._directory = directory
        self._refusal: str | None = None
        self._probed: dict[torch.dtype, tuple[float, list[Measured]]] = {}

    def codec(self, samples: Sequence[Bytes], nbytes: int, dtype: torch.dtype) -> str | None:
        """Returns the codec for a tensor of `nbytes` of which there are `samples`, or None to store it as it is."""
        if self.asked is None or not samples:
            return None
        ratios = {codec: ratio(samples, codec, dtype.itemsize) for codec in CODECS if self.asked in (codec, "auto")}
        codec = self.asked if self.asked != "auto" else self._fastest(samples, ratios, nbytes, dtype)
        return codec if codec is not None and gains(nbytes, ratios[codec]) else None

    def _fastest(
        self, samples: Sequence[Bytes], ratios: dict[str, float], nbytes: int, dtype: torch.dtype
    ) -> str | None:
        if dtype not in self._probed and nbytes >= SAMPLE_BYTES and self._refusal is None:
            self._probe(samples, dtype)
        if dtype not in self._probed:
            return None
        disk_bps, measured = self._probed[dtype]
        found = choose([one.at(ratios[one.codec], disk_bps) for one in measured], disk_bps)
        return found.codec if found is not None else None

    def _probe(self, samples: Sequence[Bytes], dtype: torch.dtype) -> None:
        try:
            self._probed[dtype] = probe(samples, dtype.itemsize, self._directory)
        except OSError as error:
            self._refusal = f"the disk cannot be measured ({error})"

    @property
    def state(self) -> dict[str, Any]:
        """What was measured, for `restore`."""
        probed = {
            dtype_name(dtype): (disk_bps, [asdict(one) for one in measured])
            for dtype, (disk_bps, measured) in self._probed.items()
        }
        return {"refusal": self._refusal, "probed": probed}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what another one has measured."""
        self._refusal = state["refusal"]
        for name, (disk_bps, measured) in state["probed"].items():
            self._probed[getattr(torch, name)] = disk_bps, [Measured(**one) for one in measured]

    def attributes(self, nbytes: int, stored_bytes: int) -> dict[str, Any]:
        """Returns what was asked, measured and decided, as the attributes of the store keep it."""
        found: dict[str, Any] = {"asked": self.asked, "nbytes": nbytes, "stored_bytes": stored_bytes}
        if self.asked == "auto":
            found["refusal"] = self._refusal
            found["dtypes"] = {
                dtype_name(dtype): {
                    "codec": getattr(choose(measured, disk_bps), "codec", None),
                    "disk_bps": disk_bps,
                    "measured": [
                        asdict(one) | {"break_even_bps": one.break_even_bps(disk_bps, n_processors())}
                        for one in measured
                    ],
                }
                for dtype, (disk_bps, measured) in self._probed.items()
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
        verdict = "chosen" if chosen["codec"] is None else "not chosen"
        lines.append(f"{dtype} as it is, {verdict}: read with {_gbps(chosen['disk_bps'])}")
        for one in chosen["measured"]:
            verdict = "chosen" if one["codec"] == chosen["codec"] else "not chosen"
            lines.append(
                f"{dtype} {one['codec']}, {verdict}: ratio {one['ratio']:.2f}, read with {_gbps(one['read_bps'])}, "
                f"decoded with {_gbps(one['decode_bps'])} per thread; wins on disks below about "
                f"{_gbps(one['break_even_bps'])}"
            )
    return lines


def _gbps(bps: float) -> str:
    return f"{format_bytes(int(bps))}/s"
