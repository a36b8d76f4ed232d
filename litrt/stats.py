"""What a runtime has done so far."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

_LEVELS = frozenset({"peak_bytes", "budget_bytes", "resident_bytes", "host_peak_bytes", "link_bps"})


@dataclass(frozen=True)
class Stats:
    """Counts since the runtime was made; the warm-up counts in bytes read and `peak_bytes` only.

    Attributes:
        n_passes: Passes of the root module that ended, warm-up passes not counted.
        n_hits: Uses of a streamed weight that was there when an operator asked for it.
        n_late: Uses of a streamed weight that was on its way, so that the operator waited.
        n_faults: Uses of a weight that was neither there nor on its way.
        read_bytes: Bytes of weights read from the store.
        gathered_bytes: Part of `read_bytes` that was read for rows of weights that were not there whole.
        stall_s: Seconds that operators waited for weights: the caller, or the device, whichever had to.
        peak_bytes: Most weight bytes held at any moment, those in flight and the scratch of reads included.
        budget_bytes: What `peak_bytes` may not exceed.
        resident_bytes: Bytes of the weights that stay.
        link_bytes: Bytes of weights copied to the device; 0 on the CPU, which has no link.
        link_stall_s: Part of `stall_s` that the device waited for copies.
        disk_stall_s: Seconds that copies waited for the store.
        host_peak_bytes: Most host memory that was taken for weights on their way to the device.
        link_bps: Bytes per second of the link, measured when the runtime was made.
    """

    n_passes: int = 0
    n_hits: int = 0
    n_late: int = 0
    n_faults: int = 0
    read_bytes: int = 0
    gathered_bytes: int = 0
    stall_s: float = 0.0
    peak_bytes: int = 0
    budget_bytes: int = 0
    resident_bytes: int = 0
    link_bytes: int = 0
    link_stall_s: float = 0.0
    disk_stall_s: float = 0.0
    host_peak_bytes: int = 0
    link_bps: float = 0.0

    def since(self, earlier: Stats) -> Stats:
        """Returns the counts since `earlier`; peaks, budgets and other levels stay as they are."""
        changed = {
            field.name: getattr(self, field.name) - getattr(earlier, field.name)
            for field in fields(self)
            if field.name not in _LEVELS
        }
        return replace(self, **changed)
