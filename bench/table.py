"""Writes the README's table from the raw samples in bench/results; a test checks that it is up to date.

python bench/table.py
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMES = {
    "litrt": "**litrt**",
    "pytorch-lit": "PyTorch-LIT 0.1.7",
    "accelerate": "accelerate `disk_offload`",
    "safetensors-mmap": "memory-mapped safetensors",
    "plain": "plain model, no limit",
}


def table(report: dict) -> str:  # type: ignore[type-arg]
    """Returns the medians of a report of bench/peers.py as a table in Markdown."""
    want = next(result["sha256"] for result in report["results"] if result["system"] == "plain")
    lines = ["| system | seconds per pass | largest resident set | values |", "|---|---|---|---|"]
    for system, name in NAMES.items():
        mine = [result for result in report["results"] if result["system"] == system and "pass_s" in result]
        if not mine:
            continue
        seconds = [second for result in mine for second in result["pass_s"]]
        memory = max(result["max_rss_bytes"] for result in mine) / 1e9
        same = all(result["sha256"] == want for result in mine)
        lines.append(
            f"| {name} | {statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | {memory:.1f} GB "
            f"| {'bit-identical' if same else 'differ'} |"
        )
    plain_s = [s for result in report["results"] if result["system"] == "plain" for s in result["pass_s"]]
    moved = [result["bound_bytes_per_pass"] for result in report["results"] if "bound_bytes_per_pass" in result]
    disk_bps = statistics.median(result["disk_bps"] for result in report["results"])
    bound_s = max(statistics.median(moved) / disk_bps, statistics.median(plain_s))
    lines.append(f"| bound: a budget of {report['budget']}, a disk of {disk_bps / 1e9:.2f} GB/s | {bound_s:.2f} | | |")
    return "\n".join(lines)


def filled(readme: str) -> str:
    """Returns the README with its tables written from the files that they name."""

    def fill(match: re.Match[str]) -> str:
        report = json.loads((ROOT / match[1]).read_text())
        return f"<!-- table: {match[1]} -->\n{table(report)}\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", fill, readme, flags=re.DOTALL)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(filled(path.read_text()))
