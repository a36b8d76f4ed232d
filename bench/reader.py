"""The reader beside the disk: bytes per second and processor seconds per GB, at several numbers of threads.

    python -m bench reader --folder /on/the/disk --out bench/results/reader.json

Writes a file and two stores of the same weights, uncompressed and with lz4. Raw direct reads of the file, of 32 MiB
into huge pages, and reads of the stores through litrt, checked and decoded, take turns at every number of threads; what
is printed are medians. Bytes are those of the values: a compressed store can be faster than the disk. The last lines
say what a runtime chooses for each store.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

import litrt
from bench.machine import described, read_bps, write_report
from litrt.device import CpuDevice
from litrt.reader import Reader
from litrt.tune import tune
from litrt.units import format_bytes

WIDTH = 4096


class Weights(Mapping[str, torch.Tensor]):
    """Square matrices of float32 with the exponents of trained weights, made when they are asked for."""

    def __init__(self, n_bytes: int) -> None:
        self._n = max(n_bytes // (4 * WIDTH * WIDTH), 1)

    def __getitem__(self, name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int(name))
        return torch.randn(WIDTH, WIDTH, generator=generator) * 0.02

    def __iter__(self) -> Iterator[str]:
        return map(str, range(self._n))

    def __len__(self) -> int:
        return self._n


def read_store(reader: Reader, n_threads: int, n_in_flight: int | None = None) -> int:
    """Reads every piece of a store, and returns the bytes of its values."""
    reader.n_in_flight = n_in_flight
    pieces = [piece for name in reader.store for piece in reader.pieces(name)]
    most_bytes = max(piece.nbytes for piece in pieces)
    taken = count()

    def run(memory: Any) -> None:
        while (number := next(taken)) < len(pieces):
            reader.read_part(pieces[number], memory[: pieces[number].nbytes])

    memories = [CpuDevice().allocate(most_bytes) for _ in range(n_threads)]
    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(run, memories))
    return sum(piece.nbytes for piece in pieces)


def read_raw(file: Path, n_threads: int) -> int:
    """Reads a file past the page cache, and returns its bytes."""
    n_bytes = file.stat().st_size
    if read_bps(file, n_threads, n_bytes) is None:
        raise OSError(f"{file} cannot be read past the page cache: choose a --folder on another file system.")
    return n_bytes


def timed(call: Callable[[], int]) -> dict[str, float]:
    """Returns bytes per second and processor seconds per GB of a call that returns bytes."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    began_s = time.perf_counter()
    n_bytes = call()
    seconds = time.perf_counter() - began_s
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"bps": n_bytes / seconds, "cpu_s_per_gb": cpu_s / n_bytes * 1e9}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    n_bytes = int(arguments.gb * 1e9)
    weights = Weights(n_bytes)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        file = Path(folder) / "raw"
        with open(file, "wb") as raw:
            for name in weights:
                raw.write(weights[name].numpy().tobytes())
        readers = {
            codec or "none": Reader(litrt.convert(weights, Path(folder) / f"{codec}.zarr", compress=codec))
            for codec in (None, "lz4")
        }
        size = file.stat().st_size
        rows = []
        for n_threads in arguments.threads:
            calls: dict[str, Callable[[], int]] = {"raw": partial(read_raw, file, n_threads)}
            for codec, reader in readers.items():
                for most in sorted({min(n_threads, 2), n_threads}):
                    calls[f"{codec}, {most} at once"] = partial(read_store, reader, n_threads, most)
            samples: dict[str, list[dict[str, float]]] = {what: [] for what in calls}
            for _ in range(arguments.repeats):
                for what, call in calls.items():
                    samples[what].append(timed(call))
            rows.append({"n_threads": n_threads, "samples": samples})
            print(line(rows[-1]), flush=True)
        tuned = {}
        for codec, reader in readers.items():
            began_s = time.perf_counter()
            chosen = tune(reader, list(reader.store.values()), size // 2, reader.scratch_bytes_per_task)
            tuned[codec] = dataclasses.asdict(chosen) | {"seconds": time.perf_counter() - began_s}
            print(codec, tuned[codec], flush=True)
            reader.close()
        stored = readers["lz4"].store.compression
    return {"machine": described(), "n_bytes": size, "lz4": stored, "results": rows, "tuned": tuned}


def line(row: dict[str, Any]) -> str:
    """Returns the medians of one number of threads."""
    raw_bps = statistics.median(sample["bps"] for sample in row["samples"]["raw"])
    cells = []
    for what, samples in row["samples"].items():
        bps = statistics.median(sample["bps"] for sample in samples)
        cpu_s = statistics.median(sample["cpu_s_per_gb"] for sample in samples)
        cells.append(f"{what} {format_bytes(int(bps))}/s ({bps / raw_bps:.2f} of raw, {cpu_s:.3f} CPU s per GB)")
    return f"{row['n_threads']} threads: " + "\n  ".join(cells)


def main(argv: list[str]) -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(
        prog="python -m bench reader", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    parser.add_argument("--gb", type=float, default=3.0)
    parser.add_argument("--threads", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 3, 4, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    report = measure(arguments)
    if arguments.out is not None:
        write_report(arguments.out, report)
    return 0
