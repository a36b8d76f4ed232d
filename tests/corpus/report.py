"""The table of what was served."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Row:
    """What became of a model.

    Attributes:
        name: The model type and the class, or the name alone of what was not built.
        outcome: "refused" for what writes its weights, "not built" for what does not run as the plain model either.
        family: Which inputs it takes.
        weight_bytes: Of its weights.
        reason: Why it was not built, or what went wrong.
    """

    name: str
    outcome: Literal["served", "refused", "not built", "failed"]
    family: str = "?"
    weight_bytes: int = 0
    reason: str = ""


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """Yields the lines of the table: the served ones by family, then the others with their reasons."""
    by_family: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.outcome == "served":
            by_family[row.family].append(row)
    n_served = sum(map(len, by_family.values()))
    failed = [row for row in rows if row.outcome == "failed"]
    yield f"{n_served} of {n_served + len(failed)} models that run as the plain model are served."
    for family, served in sorted(by_family.items(), key=lambda item: -len(item[1])):
        names = ", ".join(sorted(row.name.split(":")[0] for row in served))
        yield f"{family} ({len(served)}): {names}"
    for title, others in (
        ("not served", failed),
        ("refused, for it writes its weights", [row for row in rows if row.outcome == "refused"]),
        ("nothing to compare with", [row for row in rows if row.outcome == "not built"]),
    ):
        if others:
            yield f"{title} ({len(others)}):"
        for row in sorted(others, key=lambda row: row.name):
            yield f"  {row.name}: {' '.join(row.reason.split())[:200]}"
