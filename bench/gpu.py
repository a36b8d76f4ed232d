"""litrt on a GPU beside the plain model and other offloading, at several budgets and batch sizes, against the bound.

    python bench/gpu.py --out bench/results/gpu.json           # minutes; writes the raw samples, a table and a picture
    python bench/gpu.py --dry-run                              # the same code, small, without a GPU

The model is a transformer of GPT-J's layer shape in bfloat16, with random weights. A pass is one forward of so many
tokens. The bound of a pass is the longer of the plain model's seconds and the fewest bytes that must cross the link, at
the link's measured bandwidth. Systems that are not installed are left out, and the file says so. Every output is
compared bit by bit with the plain model's.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import litrt
from litrt.testing import FakeDevice

Cell = dict[str, Any]


class Block(nn.Module):
    """A layer of GPT-J: attention and feed-forward side by side, behind one norm. (Rotary embeddings are left out.)"""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.fc_in, self.fc_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        q, k, v = (part(y).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        inner: torch.Tensor = self.fc_out(F.gelu(self.fc_in(y), approximate="tanh"))
        return x.add(self.out(attended)).add(inner)


class Model(nn.Module):
    """An embedding, layers, a norm and a head."""

    def __init__(self, n_layers: int, width: int, n_words: int) -> None:
        super().__init__()
        self.words = nn.Embedding(n_words, width)
        self.blocks = nn.ModuleList(Block(width, max(width // 256, 1)) for _ in range(n_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, n_words)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x[:, -1:]))
        return logits


class Machine:
    """The GPU, or for a dry run the CPU and a device that is not there."""

    def __init__(self, dry_run: bool) -> None:
        self.dry_run = dry_run
        self.device = torch.device("cpu" if dry_run else "cuda")

    def serving(self) -> Any:
        """Returns what litrt serves on."""
        return FakeDevice("random", memory_bytes=8 << 30) if self.dry_run else self.device

    def synchronize(self) -> None:
        if not self.dry_run:
            torch.cuda.synchronize()

    def peak_bytes(self) -> int:
        """Returns the most that was allocated since the last call."""
        if self.dry_run:
            return 0
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak

    def described(self) -> dict[str, Any]:
        found = {"torch": torch.__version__, "python": platform.python_version(), "litrt": "0.1.0"}
        if not self.dry_run:
            found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda or ""}
        return found


def timed(machine: Machine, call: Callable[[], torch.Tensor], n_passes: int) -> tuple[list[float], torch.Tensor]:
    """Returns the seconds of passes, after two that do not count, and the last output."""
    seconds = []
    for number in range(n_passes + 2):
        machine.synchronize()
        began_s = time.perf_counter()
        output = call()
        machine.synchronize()
        if number >= 2:
            seconds.append(time.perf_counter() - began_s)
    return seconds, output


def measure(
    machine: Machine,
    name: str,
    call: Callable[[torch.Tensor], torch.Tensor],
    inputs: dict[int, torch.Tensor],
    want: Any,
    n_passes: int,
) -> list[Cell]:
    """Returns the cells of one system: one for each batch size."""
    cells = []
    for n_tokens, ids in inputs.items():
        machine.peak_bytes()
        seconds, output = timed(machine, partial(call, ids), n_passes)
        same = want is None or torch.equal(output.cpu(), want[n_tokens])
        cells.append(
            {"system": name, "n_tokens": n_tokens, "pass_s": seconds, "peak_bytes": machine.peak_bytes(), "same": same}
        )
        print(f"{name:<28}{n_tokens:>6} tokens {statistics.median(seconds):>9.4f} s  {'' if same else 'DIFFERENT'}")
    return cells


def run_litrt(
    machine: Machine,
    ctor: Callable[[], nn.Module],
    store: Path,
    budget: str,
    inputs: dict[int, torch.Tensor],
    want: Any,
    n_passes: int,
) -> list[Cell]:
    cells = []
    for n_tokens, ids in inputs.items():
        with litrt.Runtime(ctor, store, budget=budget, device=machine.serving()) as rt:
            rt.warmup(ids)
            (cell,) = measure(machine, "litrt", rt, {n_tokens: ids}, want, n_passes)
            before = rt.stats()
            rt(ids)
            machine.synchronize()
            counted = rt.stats().since(before)
            cell |= {
                "budget": budget,
                "link_bytes": counted.link_bytes,
                "planned_bytes": rt.plan.streamed_bytes,
                "bound_bytes": rt.plan.bound_bytes,
                "link_bps": counted.link_bps,
                "predicted_s": rt.plan.pass_s,
                "late": counted.n_late,
                "faults": counted.n_faults,
                "link_stall_s": counted.link_stall_s,
                "held_bytes": counted.peak_bytes,
                "budget_bytes": counted.budget_bytes,
                "host_bytes": counted.host_peak_bytes,
            }
            cells.append(cell)
    return cells


def run_accelerate(machine: Machine, model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    from accelerate import cpu_offload

    offloaded: Callable[[torch.Tensor], torch.Tensor] = cpu_offload(model, execution_device=machine.device)
    return offloaded


def run_diffusers(machine: Machine, model: nn.Module, kind: str) -> Callable[[torch.Tensor], torch.Tensor]:
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        model,
        onload_device=machine.device,
        offload_device=torch.device("cpu"),
        offload_type=kind,
        num_blocks_per_group=1 if kind == "block_level" else None,
        use_stream=not machine.dry_run,
        non_blocking=not machine.dry_run,
    )
    return model


def bench(arguments: argparse.Namespace) -> dict[str, Any]:
    machine = Machine(arguments.dry_run)
    dtype = torch.bfloat16

    def ctor() -> nn.Module:
        return Model(arguments.layers, arguments.width, arguments.words).to(dtype)

    torch.manual_seed(0)
    host = ctor().eval()
    weights_bytes = sum(parameter.nbytes for parameter in host.parameters())
    print(f"{weights_bytes / 1e9:.2f} GB of weights")
    inputs = {
        n_tokens: torch.randint(0, arguments.words, (1, n_tokens)).to(machine.device) for n_tokens in arguments.tokens
    }
    cells: list[Cell] = []
    left_out = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, torch.no_grad():
        store = Path(folder) / "model.zarr"
        litrt.convert(host.state_dict(), store, progress=False)
        state = {name: value.clone() for name, value in host.state_dict().items()}
        plain = host.to(machine.device)
        want = {n_tokens: plain(ids).cpu() for n_tokens, ids in inputs.items()}
        cells += measure(machine, "plain", plain, inputs, None, arguments.passes)
        del plain, host
        _empty(machine)
        for budget in arguments.budgets:
            cells += run_litrt(machine, ctor, store, budget, inputs, want, arguments.passes)
            _empty(machine)
        peers: dict[str, tuple[str, Callable[[nn.Module], Callable[[torch.Tensor], torch.Tensor]]]] = {
            "accelerate cpu_offload": ("accelerate", partial(run_accelerate, machine)),
            "diffusers leaf_level": ("diffusers", partial(run_diffusers, machine, kind="leaf_level")),
            "diffusers block_level": ("diffusers", partial(run_diffusers, machine, kind="block_level")),
        }
        for name, (package, start) in peers.items():
            if importlib.util.find_spec(package) is None:
                left_out[name] = f"{package} is not installed"
                continue
            try:
                model = ctor().eval()
                model.load_state_dict(state)
                cells += measure(machine, name, start(model), inputs, want, arguments.passes)
            except Exception as error:
                left_out[name] = f"{type(error).__name__}: {error}"
            _empty(machine)
    return {
        "machine": machine.described(),
        "model": {"n_layers": arguments.layers, "width": arguments.width, "dtype": "bfloat16", "bytes": weights_bytes},
        "left_out": left_out,
        "results": cells,
    }


def _empty(machine: Machine) -> None:
    gc.collect()
    if not machine.dry_run:
        torch.cuda.empty_cache()


def bounds(report: dict[str, Any], cell: Cell) -> float:
    """Returns the seconds that no schedule can beat for a cell of litrt."""
    plain_s = next(
        statistics.median(other["pass_s"])
        for other in report["results"]
        if other["system"] == "plain" and other["n_tokens"] == cell["n_tokens"]
    )
    return max(float(plain_s), float(cell["bound_bytes"]) / float(cell["link_bps"]))


def table(report: dict[str, Any]) -> str:
    """Returns the medians as a table in Markdown."""
    lines = ["| system | budget | tokens | seconds per pass | over the bound | values |", "|---|---|---|---|---|---|"]
    for cell in report["results"]:
        median_s = statistics.median(cell["pass_s"])
        over = f"{median_s / bounds(report, cell):.2f}" if cell["system"] == "litrt" else ""
        values = "bit-identical" if cell["same"] else "differ"
        lines.append(
            f"| {cell['system']} | {cell.get('budget', '')} | {cell['n_tokens']} | {median_s:.4f} | {over} | {values} |"
        )
    lines += [f"\n{name} was left out: {why}" for name, why in report["left_out"].items()]
    return "\n".join(lines)


def picture(report: dict[str, Any], path: Path) -> None:
    """Draws seconds per pass against budget, one panel per batch size: litrt, the bound, and the others as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = list(dict.fromkeys(cell["n_tokens"] for cell in report["results"]))
    figure, panels = pyplot.subplots(1, len(sizes), figsize=(5 * len(sizes), 4), squeeze=False)
    for panel, n_tokens in zip(panels[0], sizes, strict=True):
        cells = [cell for cell in report["results"] if cell["n_tokens"] == n_tokens]
        mine = [cell for cell in cells if cell["system"] == "litrt"]
        budgets = [float(cell["budget"].rstrip("%")) for cell in mine]
        bound_s = [bounds(report, cell) for cell in mine]
        panel.fill_between(budgets, bound_s, min(bound_s) / 10, color="0.9", label="no schedule")
        panel.plot(budgets, [statistics.median(cell["pass_s"]) for cell in mine], "o-", label="litrt")
        for number, cell in enumerate(other for other in cells if other["system"] != "litrt"):
            style = ("-", "--", ":", "-.")[number % 4]
            panel.axhline(statistics.median(cell["pass_s"]), linestyle=style, color="0.4", label=cell["system"])
        panel.set(
            yscale="log", xlabel="budget, % of the weights", ylabel="seconds per pass", title=f"{n_tokens} tokens"
        )
        panel.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--words", type=int, default=50_400)
    parser.add_argument("--budgets", type=lambda text: text.split(","), default=["10%", "25%", "50%", "75%", "100%"])
    parser.add_argument("--tokens", type=lambda text: [int(n) for n in text.split(",")], default=[1, 128, 2048])
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where the store goes")
    parser.add_argument("--out", type=Path, help="raw samples; the picture gets the same name")
    parser.add_argument("--dry-run", action="store_true", help="small, on the CPU, with a device that is not there")
    arguments = parser.parse_args(argv)
    if arguments.dry_run:
        arguments.layers, arguments.width, arguments.words = 3, 128, 1000
        arguments.tokens, arguments.passes = [1, 16], 2
        arguments.budgets = ["30%", "100%"]
    report = bench(arguments)
    print(table(report))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
        if importlib.util.find_spec("matplotlib") is not None:
            picture(report, arguments.out.with_suffix(".png"))
    return report


if __name__ == "__main__":
    main()
