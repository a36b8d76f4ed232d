"""litrt beside other ways to run a model that is larger than memory, all inside one memory limit.

    python bench/peers.py make DIR --layers 8        # a GPT-J with random weights, once per peer's format
    python bench/peers.py run DIR --limit 4GB --budget 3GB --out bench/results/peers.json

`run` starts every system in a process of its own, inside a memory control group (version 1 or 2, needs root) that
counts the page cache, and drops the page cache and measures the disk before each; the systems take turns. Each does a
warm-up pass and then timed passes over the same 32 tokens. The plain model, without a limit, gives the values that all
are compared with, bit by bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from machine import described, read_bps
from torch import nn

import litrt
from litrt.units import format_bytes, parse_bytes

SYSTEMS = ("litrt", "pytorch-lit", "accelerate", "safetensors-mmap")
N_TOKENS = 32


def model_ctor(n_layers: int) -> nn.Module:
    from transformers import GPTJConfig, GPTJForCausalLM

    return GPTJForCausalLM(GPTJConfig(n_layer=n_layers))


class RandomWeights(Mapping[str, torch.Tensor]):
    """Weights of a model, each made when it is asked for, always the same."""

    def __init__(self, n_layers: int) -> None:
        with torch.device("meta"):
            model = model_ctor(n_layers)
        self.metas = dict(model.named_parameters()) | {
            name: tensor for name, tensor in model.state_dict().items() if name not in dict(model.named_parameters())
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        meta = self.metas[name]
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        values = torch.empty(meta.shape, dtype=meta.dtype)
        return values.normal_(0, 0.02, generator=torch.Generator().manual_seed(seed))

    def __iter__(self) -> Iterator[str]:
        return iter(self.metas)

    def __len__(self) -> int:
        return len(self.metas)


def tokens() -> torch.Tensor:
    return torch.randint(0, 50_000, (1, N_TOKENS), generator=torch.Generator().manual_seed(0))


def make(folder: Path, n_layers: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = RandomWeights(n_layers)
    (folder / "model.json").write_text(json.dumps({"n_layers": n_layers}))
    if not (folder / "model.zarr").exists():
        litrt.convert(weights, folder / "model.zarr")
    if not (folder / "accelerate" / "index.json").exists():
        from accelerate.utils import offload_state_dict

        offload_state_dict(str(folder / "accelerate"), weights)  # type: ignore[arg-type]
    if not (folder / "model.safetensors").exists():
        _save_safetensors(weights, folder / "model.safetensors")
    if not (folder / "pytorch-lit" / "meta.json").exists():
        from pytorch_lit import prepare_params

        class Weights(dict):  # type: ignore[type-arg]
            def keys(self):  # type: ignore[no-untyped-def]
                return weights.keys()

            def __getitem__(self, name: str) -> torch.Tensor:
                return weights[name]

        prepare_params(Weights(), str(folder / "pytorch-lit"), progress=False)


def _save_safetensors(weights: RandomWeights, path: Path) -> None:
    header: dict[str, object] = {}
    offset = 0
    for name, meta in weights.metas.items():
        header[name] = {"dtype": "F32", "shape": list(meta.shape), "data_offsets": [offset, offset + meta.nbytes]}
        offset += meta.nbytes
    encoded = json.dumps(header).encode()
    with path.with_suffix(".partial").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in weights:
            weights[name].numpy().tofile(file)
    path.with_suffix(".partial").rename(path)


# One system in one process.


def _litrt(folder: Path, ctor: Callable[[], nn.Module], budget: str) -> tuple[Callable[[torch.Tensor], object], object]:
    rt = litrt.Runtime(ctor, folder / "model.zarr", budget=budget)
    rt.warmup(tokens())
    return rt, rt


def _pytorch_lit(
    folder: Path, ctor: Callable[[], nn.Module], budget: str
) -> tuple[Callable[[torch.Tensor], object], object]:
    from pytorch_lit import LitModule

    module = LitModule.from_params(str(folder / "pytorch-lit"), lambda: ctor().eval(), device="cpu")
    return module, None


def _accelerate(
    folder: Path, ctor: Callable[[], nn.Module], budget: str
) -> tuple[Callable[[torch.Tensor], object], object]:
    from accelerate import disk_offload, init_empty_weights

    with init_empty_weights():
        model = ctor().eval()
    model = disk_offload(model, str(folder / "accelerate"), execution_device=torch.device("cpu"))
    return model, None


def _safetensors_mmap(
    folder: Path, ctor: Callable[[], nn.Module], budget: str
) -> tuple[Callable[[torch.Tensor], object], object]:
    from accelerate import init_empty_weights
    from safetensors.torch import load_file

    with init_empty_weights():
        model = ctor().eval()
    model.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
    return model, None


def _plain(folder: Path, ctor: Callable[[], nn.Module], budget: str) -> tuple[Callable[[torch.Tensor], object], object]:
    model = ctor().eval()
    weights = RandomWeights(json.loads((folder / "model.json").read_text())["n_layers"])
    with torch.no_grad():
        for name, values in model.state_dict().items():
            values.copy_(weights[name])
    return model, None


def work(system: str, folder: Path, budget: str, n_passes: int) -> None:
    n_layers = json.loads((folder / "model.json").read_text())["n_layers"]
    start = {
        "litrt": _litrt,
        "pytorch-lit": _pytorch_lit,
        "accelerate": _accelerate,
        "safetensors-mmap": _safetensors_mmap,
        "plain": _plain,
    }[system]
    began_s = time.perf_counter()
    model, runtime = start(folder, lambda: model_ctor(n_layers), budget)
    ids = tokens()
    seconds = []
    result: dict[str, object] = {"system": system}
    with torch.no_grad():
        output = model(ids, use_cache=False)  # type: ignore[call-arg]
        result["ready_s"] = time.perf_counter() - began_s
        before = runtime.stats() if isinstance(runtime, litrt.Runtime) else None
        for _ in range(n_passes):
            del output
            pass_began_s = time.perf_counter()
            output = model(ids, use_cache=False)  # type: ignore[call-arg]
            seconds.append(time.perf_counter() - pass_began_s)
    logits: torch.Tensor = output.logits  # type: ignore[attr-defined]
    result["sha256"] = hashlib.sha256(logits.contiguous().numpy().tobytes()).hexdigest()
    result["pass_s"] = seconds
    result["max_rss_bytes"] = _status_bytes("VmHWM")
    result["rss_anon_bytes"] = _status_bytes("RssAnon")
    if isinstance(runtime, litrt.Runtime) and before is not None:
        stats = runtime.stats()
        result["read_bytes_per_pass"] = stats.since(before).read_bytes / n_passes
        result["planned_bytes_per_pass"] = runtime.plan.streamed_bytes
        result["bound_bytes_per_pass"] = runtime.plan.bound_bytes
        result["predicted_s"] = runtime.plan.pass_s
        result["bandwidth_bps"] = runtime.plan.bandwidth_bps
        result["stall_s_per_pass"] = stats.since(before).stall_s / n_passes
        result["faults"] = stats.n_faults
        result["peak_bytes"] = stats.peak_bytes
        result["budget_bytes"] = stats.budget_bytes
        print(runtime.plan, file=sys.stderr)
        runtime.close()
    print(json.dumps(result))


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


# All of them, in turn.


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[Callable[[], None]]:
    """Makes a memory control group; yields what moves the calling process into it."""
    version_1 = Path("/sys/fs/cgroup/memory")
    group = (version_1 if version_1.is_dir() else Path("/sys/fs/cgroup")) / f"litrt-bench-{os.getpid()}"
    group.mkdir()
    (group / ("memory.limit_in_bytes" if version_1.is_dir() else "memory.max")).write_text(str(limit_bytes))
    try:
        yield lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None
    finally:
        group.rmdir()


def run(
    folder: Path, limit_bytes: int, budget: str, systems: list[str], n_rounds: int, n_passes: int, out: Path | None
) -> None:
    results = []
    jobs = [("plain", 0)] * ("plain" not in systems) + [
        (system, number) for number in range(n_rounds) for system in systems
    ]
    for system, number in jobs:
        subprocess.run(["sync"], check=True)
        Path("/proc/sys/vm/drop_caches").write_text("3")
        disk_bps = read_bps(folder / "model.safetensors")  # the disk is not equally fast at all times
        command = [sys.executable, __file__, "work", str(folder), "--system", system, "--budget", budget]
        command += ["--passes", str(n_passes)]
        if system == "plain":
            process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        else:
            with memory_group(limit_bytes) as enter:
                process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, preexec_fn=enter)
        if process.returncode:
            result = {"system": system, "exit_status": process.returncode}
        else:
            result = json.loads(process.stdout.splitlines()[-1])
        results.append({**result, "round": number, "disk_bps": disk_bps})
        print(json.dumps(results[-1]), flush=True)
    report = {
        "machine": described(),
        "model": {"name": "GPT-J", **json.loads((folder / "model.json").read_text()), "dtype": "float32"},
        "n_tokens": N_TOKENS,
        "limit_bytes": limit_bytes,
        "budget": budget,
        "results": results,
    }
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


def table(report: dict) -> str:  # type: ignore[type-arg]
    """Returns the medians of a report, one line per system."""
    results = report["results"]
    want = next((result.get("sha256") for result in results if result["system"] == "plain"), None)
    lines = [f"{'system':<18}{'s per pass':>12}{'ready s':>10}{'max RSS':>12}  values"]
    for system in dict.fromkeys(result["system"] for result in results):
        mine = [result for result in results if result["system"] == system]
        done = [result for result in mine if "pass_s" in result]
        if not done:
            lines.append(f"{system:<18}{'failed':>12}")
            continue
        same = all(result["sha256"] == want for result in done)
        lines.append(
            f"{system:<18}{statistics.median(s for result in done for s in result['pass_s']):>12.2f}"
            f"{statistics.median(result['ready_s'] for result in done):>10.1f}"
            f"{format_bytes(max(result['max_rss_bytes'] for result in done)):>12}"
            f"  {'bit-identical' if same else 'differ'}" + ("" if len(done) == len(mine) else "  (some runs failed)")
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("make", "run", "work"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--limit", default="4GB")
    parser.add_argument("--budget", default="3GB")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--system")
    arguments = parser.parse_args()
    if arguments.command == "make":
        make(arguments.folder, arguments.layers)
    elif arguments.command == "work":
        work(arguments.system, arguments.folder, arguments.budget, arguments.passes)
    else:
        systems = arguments.systems.split(",")
        limit_bytes = parse_bytes(arguments.limit)
        run(arguments.folder, limit_bytes, arguments.budget, systems, arguments.rounds, arguments.passes, arguments.out)


if __name__ == "__main__":
    main()
