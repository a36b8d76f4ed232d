"""Raw samples of a sweep: JSON lines, the first of which describes it. What tables and pictures are made from."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bench.traces import from_json
from litrt.bound import groups, min_pass_s
from litrt.trace import Trace

Cell = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """Seconds, over all passes and rounds."""

    median_s: float
    min_s: float
    max_s: float


@dataclass(frozen=True)
class Samples:
    """A sweep.

    Attributes:
        header: The machine, the model and the arguments.
        cells: One per system, budget, policy and round, in the order in which they were measured.
        traces: What the passes did: several where a pass uses other weights at another budget.
    """

    header: dict[str, Any]
    cells: list[Cell] = field(repr=False)
    traces: list[Trace] = field(repr=False)

    @property
    def model_bytes(self) -> int:
        """Bytes of the weights."""
        return int(self.header["model"]["bytes"])

    @property
    def systems(self) -> list[str]:
        """The systems other than litrt, in order."""
        return list(dict.fromkeys(cell["system"] for cell in self.cells if cell["system"] != "litrt"))

    @property
    def policies(self) -> list[str]:
        """The policies of litrt, in order."""
        return list(dict.fromkeys(cell["policy"] for cell in self.cells if cell["system"] == "litrt"))

    @property
    def budgets(self) -> list[str]:
        """The budgets that worked, as they were asked for, by size."""
        size = {cell["budget"]: cell["budget_bytes"] for cell in self.cells if "budget_bytes" in cell}
        return sorted(size, key=lambda budget: int(size[budget]))

    def of(self, system: str, budget: str | None = None, policy: str | None = None) -> list[Cell]:
        """Returns the cells of a system that worked."""
        return [
            cell
            for cell in self.cells
            if cell["system"] == system
            and (budget is None or cell["budget"] == budget)
            and (policy is None or cell["policy"] == policy)
            and "sha256" in cell
        ]

    def spread(self, cells: Iterable[Cell]) -> Spread | None:
        """Returns the seconds of cells; of a generation, those per token. None if there are none."""
        n_new = self.header["arguments"]["new_tokens"] if self.header["arguments"]["mode"] == "generate" else 1
        seconds = [second / n_new for cell in cells for second in cell["pass_s"]]
        return Spread(statistics.median(seconds), min(seconds), max(seconds)) if seconds else None

    def is_same(self, cells: Iterable[Cell]) -> bool:
        """Says whether what cells returned is, bit for bit, what the plain model did."""
        return all(cell["same"] for cell in cells)

    @cached_property
    def disk_bps(self) -> float | None:
        """Bytes per second of reading past the page cache, without litrt; None if that was not possible."""
        measured = [cell["disk_bps"] for cell in self.cells if cell.get("disk_bps")]
        return statistics.median(measured) if measured else None

    def budget_bytes(self, budget: str) -> int:
        """Returns the bytes of a budget."""
        return max(int(cell["budget_bytes"]) for cell in self.of("litrt", budget))

    def bound_s(self, budget_bytes: int) -> float | None:
        """Returns the seconds that no schedule can beat: per pass, or per token of a generation.

        The plain model's seconds are the compute; the bandwidth is the disk's, or that of a compressed store's values.
        Where the plain model does not fit, what the runtime saw of compute stands for it.
        """
        if self.header["model"]["kind"] == "moe" and self.header["arguments"]["mode"] == "generate":
            return None  # each pass of a generation has other experts
        plain = self.spread(self.of("plain"))
        if not self.traces:
            return None
        bounds = []
        for trace in self.traces:
            sizes, seconds = groups(trace)
            bandwidth_bps = (self.disk_bps or trace.bandwidth_bps) * self.header.get("compression_ratio", 1.0)
            if plain is not None and seconds.sum() > 0:
                seconds = seconds * (plain.median_s / seconds.sum())
            bounds.append(min_pass_s(sizes, seconds, budget_bytes, bandwidth_bps))
        return min(bounds)


def read(path: Path) -> Samples:
    """Reads the samples of a sweep. The last line of one that was interrupted may be cut off, and is left out."""
    lines = path.read_text().splitlines()
    found = []
    for number, line in enumerate(lines):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines) - 1:
                raise
    by_kind: dict[str, list[dict[str, Any]]] = {"sweep": [], "cell": [], "trace": []}
    for entry in found:
        by_kind[entry.pop("line")].append(entry)
    (header,) = by_kind["sweep"]
    return Samples(header, by_kind["cell"], [from_json(entry) for entry in by_kind["trace"]])
