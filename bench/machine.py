"""The machine that a benchmark runs on: what it is, and what its disk delivers without litrt."""

from __future__ import annotations

import mmap
import os
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch

REQUEST_BYTES = 32 << 20
N_THREADS = 2


def described() -> dict[str, object]:
    """Returns what goes with every result."""
    return {
        "cpu": platform.processor() or platform.machine(),
        "n_cpus": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def read_bps(path: Path, n_bytes: int = 3 << 30, n_threads: int = N_THREADS) -> float:
    """Returns the bytes per second of reading the first `n_bytes` of a file past the page cache."""
    end = min(path.stat().st_size // REQUEST_BYTES * REQUEST_BYTES, n_bytes)
    offsets = range(0, end, REQUEST_BYTES)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def read(number: int) -> None:
        buffer = mmap.mmap(-1, REQUEST_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        buffer.madvise(mmap.MADV_HUGEPAGE)
        for offset in offsets[number::n_threads]:
            if os.preadv(fd, [buffer], offset) != REQUEST_BYTES:
                raise OSError(f"{path} was read short at {offset}")

    try:
        with ThreadPoolExecutor(n_threads) as pool:
            began_s = time.perf_counter()
            list(pool.map(read, range(n_threads)))
            return len(offsets) * REQUEST_BYTES / (time.perf_counter() - began_s)
    finally:
        os.close(fd)


if __name__ == "__main__":
    print(f"{read_bps(Path(sys.argv[1])) / 1e9:.2f} GB/s")
