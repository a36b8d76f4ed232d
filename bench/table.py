"""Writes the README's tables from the raw samples in bench/results; a test checks that they are up to date.

    python -m bench table                       # the README
    python -m bench table bench/results/*.jsonl # on the terminal

In the README a table is between `<!-- table: FILE KIND BUDGET -->` and `<!-- end -->`. KIND is "peers" for the systems
beside each other at one budget, by default the smallest, or "budgets" for litrt against the bound.
"""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

from bench.peers import PEERS
from bench.samples import Cell, Samples, Spread, read

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
_PLACE = re.compile(r"<!-- table: (\S+) (\w+)(?: (\S+))? -->\n.*?<!-- end -->", flags=re.DOTALL)


def seconds(value: float) -> str:
    """Returns seconds with three digits, and no more than two decimals from 0.1 on.

    >>> seconds(12.345), seconds(0.0012345)
    ('12.35', '0.00123')
    """
    return f"{value:.{2 if value >= 0.1 else 2 - math.floor(math.log10(value)) if value > 0 else 0}f}"


def _shown(spread: Spread) -> str:
    return f"{seconds(spread.median_s)} ({seconds(spread.min_s)} to {seconds(spread.max_s)})"


def _bytes(value: float) -> str:
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.3g} MB"


def _unit(samples: Samples) -> str:
    return "token" if samples.header["arguments"]["mode"] in ("generate", "decode") else "pass"


def peers(samples: Samples, budget: str | None = None) -> str:
    """Returns the medians of all systems beside each other, at one budget, as a table in Markdown."""
    if budget is None and samples.budgets:
        budget = samples.budgets[0]
    if budget is not None and budget not in samples.budgets:
        worked = ", ".join(samples.budgets) or "none"
        raise ValueError(f"no cell of litrt worked with a budget of {budget!r}; these did: {worked}")
    lines = [
        f"| system | seconds per {_unit(samples)} | largest resident set | values |",
        "|---|---|---|---|",
    ]
    rows: list[tuple[str, list[Cell]]] = []
    for policy in samples.policies:
        name = "**litrt**" if policy == "belady" else f"litrt, policy {policy}"
        rows.append((name, samples.of("litrt", budget, policy)))
    for system in sorted(samples.systems, key=list(PEERS).index):
        title = PEERS[system].title
        if not samples.header["limit_bytes"]:
            title = title.removesuffix(", no limit")
        rows.append((title, samples.of(system)))
    for name, cells in rows:
        spread = samples.spread(cells)
        if spread is not None:
            memory = _bytes(max(cell["max_rss_bytes"] for cell in cells))
            values = "bit-identical" if samples.is_same(cells) else "differ"
            lines.append(f"| {name} | {_shown(spread)} | {memory} | {values} |")
    for system, why in failures(samples).items():
        lines.append(f"| {PEERS[system].title} | {why} | | |")
    bound_s = samples.bound_s(samples.budget_bytes(budget)) if budget is not None else None
    if bound_s is not None:
        disk = f", a disk of {samples.disk_bps / 1e9:.2f} GB/s" if samples.disk_bps else ""
        lines.append(f"| bound: a budget of {budget}{disk} | {seconds(bound_s)} | | |")
    return "\n".join(lines)


def failures(samples: Samples) -> dict[str, str]:
    """Returns the systems that never worked, and why."""
    found = {}
    for system in samples.systems:
        errors = [cell["error"] for cell in samples.cells if cell["system"] == system and "error" in cell]
        if errors and not samples.of(system):
            found[system] = errors[-1]
    return found


def budgets(samples: Samples) -> str:
    """Returns litrt at every budget, with every policy, against the bound, as a table in Markdown."""
    names = ["litrt" if policy == "belady" else policy.upper() for policy in samples.policies]
    if not names:
        return "no cell of litrt"
    first = samples.policies[0]
    heads = ["budget", *(f"{name}, s" for name in names), "bound, s", f"{names[0]} / bound", "predicted / measured"]
    heads.append(f"read per {_unit(samples)}")
    is_generated = samples.header["arguments"]["mode"] == "generate"
    n_new = samples.header["arguments"]["new_tokens"] if is_generated else 1
    if is_generated:
        heads.insert(1, "tokens per second")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for budget in samples.budgets:
        bound_s = samples.bound_s(samples.budget_bytes(budget))
        spreads = [samples.spread(samples.of("litrt", budget, policy)) for policy in samples.policies]
        cells = samples.of("litrt", budget, first)
        row = [f"{budget} ({_bytes(samples.budget_bytes(budget))})"]
        row += [_shown(spread) if spread is not None else "" for spread in spreads]
        row.append("" if bound_s is None else seconds(bound_s))
        if spreads[0] is None:
            row += [""] * (len(heads) - len(row))
        else:
            row.append("" if not bound_s else f"{spreads[0].median_s / bound_s:.2f}")
            predicted_s = sorted(cell["predicted_s"] for cell in cells)[len(cells) // 2] / n_new
            row.append(f"{predicted_s / spreads[0].median_s:.2f}")
            row.append(_bytes(max(cell["read_bytes_per_pass"] for cell in cells) / n_new))
            if is_generated:
                row.insert(1, seconds(1 / spreads[0].median_s))
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def filled(text: str) -> str:
    """Returns a text with its tables written from the files that they name."""

    def fill(match: re.Match[str]) -> str:
        name, kind, budget = match.groups()
        samples = read(ROOT / name)
        if kind not in ("peers", "budgets"):
            raise ValueError(f"{match[0].splitlines()[0]}: {kind!r} is neither 'peers' nor 'budgets'")
        made = peers(samples, budget) if kind == "peers" else budgets(samples)
        return f"{match[0].splitlines()[0]}\n{made}\n<!-- end -->"

    return _PLACE.sub(fill, text)


def main(argv: list[str]) -> int:
    """Writes the README's tables, or prints those of files."""
    parser = argparse.ArgumentParser(
        prog="python -m bench table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="*", help="raw samples to print the tables of")
    parser.add_argument("--budget", help="of the table of peers (default: the smallest that worked)")
    arguments = parser.parse_args(argv)
    if not arguments.files:
        README.write_text(filled(README.read_text()))
    for path in arguments.files:
        samples = read(path)
        print(f"{path}\n\n{peers(samples, arguments.budget)}\n\n{budgets(samples)}\n")
    return 0
