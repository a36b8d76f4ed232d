"""One line on stderr that says how far something is."""

from __future__ import annotations

import sys
import threading
import time

from litrt.units import format_bytes


class Progress:
    """Bytes that were done, of how many, and how fast: one line on stderr, rewritten, if that is a terminal.

    Threads: any number may call any method at the same time.

    Args:
        label: What is being done.
        total_bytes: How many there are, where that is known.
        shown: Show anything.
    """

    def __init__(self, label: str, total_bytes: int | None, *, shown: bool) -> None:
        self._label = label
        self._total_bytes = total_bytes
        self._shown = shown and sys.stderr is not None and sys.stderr.isatty()
        self._done_bytes = self._skipped_bytes = 0
        self._start_s = self._shown_s = time.monotonic()
        self._lock = threading.Lock()

    def add(self, n_bytes: int) -> None:
        """Counts bytes that were done; shows them ten times a second at most."""
        with self._lock:
            self._done_bytes += n_bytes
            if self._shown and time.monotonic() - self._shown_s > 0.1:
                self._show()

    def skip(self, n_bytes: int) -> None:
        """Counts bytes that had been done before."""
        with self._lock:
            self._skipped_bytes += n_bytes
        self.add(n_bytes)

    def _show(self) -> None:
        self._shown_s = time.monotonic()
        rate_bps = (self._done_bytes - self._skipped_bytes) / max(self._shown_s - self._start_s, 1e-3)
        total = "" if self._total_bytes is None else f" of {format_bytes(self._total_bytes)}"
        line = f"{self._label}: {format_bytes(self._done_bytes)}{total}, {format_bytes(int(rate_bps))}/s"
        print(f"\r{line:<70}", end="", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._show()
            print(file=sys.stderr)
