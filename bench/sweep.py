"""Seconds per pass against budget: litrt at several budgets and policies, the plain model, and the bound.

    python bench/sweep.py --layers 6 --width 2048 --out bench/results/sweep.json

The model is a GPT-J of the given size with random weights. The plain model and the runtime take turns, pass by pass, so
that both see the same machine; what is reported is the median and the ratio. Reads go past the page cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import described
from torch import nn

import litrt
from litrt.reader import Reader
from litrt.units import format_bytes


def model_ctor(n_layers: int, width: int) -> Callable[[], nn.Module]:
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(n_layer=n_layers, n_embd=width, n_head=max(width // 256, 1))
    return lambda: GPTJForCausalLM(config)


def timed(call: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    began_s = time.perf_counter()
    output = call()
    return time.perf_counter() - began_s, output


def sweep(arguments: argparse.Namespace) -> dict:  # type: ignore[type-arg]
    ctor = model_ctor(arguments.layers, arguments.width)
    ids = torch.randint(0, 50_000, (1, arguments.tokens), generator=torch.Generator().manual_seed(0))
    results = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, torch.no_grad():
        torch.manual_seed(0)
        plain = ctor().eval()
        store = litrt.convert(plain.state_dict(), Path(folder) / "model.zarr")
        reader = Reader(store)
        plain.load_state_dict({name: reader.read_tensor(name) for name in store}, assign=True)
        want = plain(ids, use_cache=False).logits
        for budget in arguments.budgets.split(","):
            for policy in arguments.policies.split(","):
                with litrt.Runtime(ctor, store, budget=budget, policy=policy) as rt:
                    rt.warmup(ids, use_cache=False)
                    before = rt.stats()
                    pairs = []
                    for _ in range(arguments.passes):
                        plain_s, _ = timed(lambda: plain(ids, use_cache=False).logits)
                        seconds, logits = timed(lambda rt=rt: rt(ids, use_cache=False).logits)
                        assert torch.equal(logits, want), f"wrong values at budget {budget}"
                        pairs.append((plain_s, seconds))
                    stats = rt.stats().since(before)
                    results.append(
                        {
                            "budget": budget,
                            "policy": policy,
                            "budget_bytes": stats.budget_bytes,
                            "peak_bytes": stats.peak_bytes,
                            "resident_bytes": stats.resident_bytes,
                            "read_bytes_per_pass": stats.read_bytes / arguments.passes,
                            "planned_bytes_per_pass": rt.plan.streamed_bytes,
                            "n_faults": stats.n_faults,
                            "stall_s_per_pass": stats.stall_s / arguments.passes,
                            "predicted_s": rt.plan.pass_s,
                            "bound_s": rt.plan.bound_s,
                            "bandwidth_bps": rt.plan.bandwidth_bps,
                            "plain_s": [pair[0] for pair in pairs],
                            "pass_s": [pair[1] for pair in pairs],
                        }
                    )
                print(line(results[-1]), flush=True)
    return {
        "machine": described(),
        "model": {"name": "GPT-J", "n_layers": arguments.layers, "width": arguments.width, "bytes": store.total_bytes},
        "n_tokens": arguments.tokens,
        "results": results,
    }


def line(result: dict) -> str:  # type: ignore[type-arg]
    seconds = statistics.median(result["pass_s"])
    ratio = statistics.median(ours / plain for plain, ours in zip(result["plain_s"], result["pass_s"], strict=True))
    return (
        f"{result['budget']:>6} {result['policy']:<7} {seconds:8.3f} s per pass, {ratio:6.3f} of the plain model, "
        f"bound {result['bound_s']:.3f} s; read {format_bytes(result['read_bytes_per_pass'])} "
        f"(planned {format_bytes(result['planned_bytes_per_pass'])}), stalled {result['stall_s_per_pass']:.3f} s, "
        f"{result['n_faults']} faults, "
        f"peak {format_bytes(result['peak_bytes'])} of {format_bytes(result['budget_bytes'])}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--budgets", default="min,25%,50%,75%,90%,100%")
    parser.add_argument("--policies", default="belady,lru")
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where the store goes, on the disk to measure")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    report = sweep(arguments)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
