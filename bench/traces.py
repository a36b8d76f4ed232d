"""Recorded traces as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from litrt.trace import Segment, Trace, Use


def as_json(trace: Trace) -> dict[str, Any]:
    """Returns a trace as JSON has it."""
    return asdict(trace)


def from_json(found: dict[str, Any]) -> Trace:
    """Returns the trace that `as_json` wrote."""
    segments = tuple(Segment(**segment) for segment in found["segments"])
    uses = tuple(Use(**{**use, "segments": tuple(use["segments"])}) for use in found["uses"])
    return Trace(segments, uses, found["bandwidth_bps"], found["latency_s"])


def same_uses(a: Trace, b: Trace) -> bool:
    """Says whether two traces use the same weights in the same order, whatever the time it took."""
    return a.segments == b.segments and [(use.segments, use.table) for use in a.uses] == [
        (use.segments, use.table) for use in b.uses
    ]
