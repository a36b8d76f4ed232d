"""The machine that a benchmark runs on: what it is, and what its disk delivers without litrt."""

from __future__ import annotations

import json
import mmap
import os
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

REQUEST_BYTES = 32 << 20
PAGE_BYTES = 4096
N_THREADS = 2
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
PACKAGES = ("torch", "transformers", "zarr", "numpy", "numcodecs", "safetensors", "accelerate", "pytorch-lit")


def described() -> dict[str, object]:
    """Returns what goes with every result."""
    return {
        "cpu": _cpu(),
        "n_cpus": os.cpu_count(),
        "n_torch_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := version_of(name)) is not None},
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def version_of(package: str) -> str | None:
    """Returns the version of a package that is installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Writes what was measured as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def drop_page_cache() -> bool:
    """Writes what is dirty and empties the page cache; says whether that was permitted."""
    os.sync()
    try:
        DROP_CACHES.write_text("3")
    except OSError:
        return False
    return True


def read_bps(path: Path, n_threads: int = N_THREADS, n_bytes: int = 3 << 30) -> float | None:
    """Returns the bytes per second of reading the first `n_bytes` of a file past the page cache.

    Requests are of 32 MiB, into huge pages. Returns None where the file system has no direct reads, or the file is
    shorter than a page for every thread.
    """
    size_bytes = min(path.stat().st_size, n_bytes)
    request_bytes = min(REQUEST_BYTES, size_bytes // n_threads // PAGE_BYTES * PAGE_BYTES)
    if not request_bytes:
        return None
    offsets = range(0, size_bytes // request_bytes * request_bytes, request_bytes)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None

    def read(number: int) -> None:
        with mmap.mmap(-1, request_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as buffer:
            buffer.madvise(mmap.MADV_HUGEPAGE)
            for offset in offsets[number::n_threads]:
                if os.preadv(fd, [buffer], offset) != request_bytes:
                    raise OSError(f"{path} was read short at {offset}")

    try:
        with ThreadPoolExecutor(n_threads) as pool:
            began_s = time.perf_counter()
            list(pool.map(read, range(n_threads)))
            return len(offsets) * request_bytes / (time.perf_counter() - began_s)
    finally:
        os.close(fd)


if __name__ == "__main__":
    bps = read_bps(Path(sys.argv[1]))
    print("no direct reads" if bps is None else f"{bps / 1e9:.2f} GB/s")
