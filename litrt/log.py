"""What operators asked for during a pass, and when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from litrt.trace import Use


@dataclass(slots=True)
class _Access:
    segments: tuple[int, ...]
    began_s: Any
    bound_s: Any
    done_s: Any = None
    n_spanned: int = 1
    table: int | None = None
    gathered_bytes: int = 0
    gathered_at: Any = None


@dataclass(slots=True)
class PassLog:
    """The accesses of one pass, in order. What is not of the pass has no number.

    Times are seconds of any clock, or marks of one that `seconds` of `uses` can tell the time between.

    Attributes:
        began_s: When the pass began.
    """

    began_s: Any = 0.0
    _accesses: list[_Access] = field(default_factory=list)
    _open: list[int] = field(default_factory=list)

    def begin(self, segments: tuple[int, ...], began_s: Any) -> int:
        """Notes that an operator asks for `segments`; returns the number of the access."""
        for number in self._open:
            self._accesses[number].n_spanned += 1
        self._accesses.append(_Access(segments, began_s, began_s))
        self._open.append(len(self._accesses) - 1)
        return self._open[-1]

    def bound(self, number: int | None, bound_s: Any) -> None:
        """Notes that the operator has what it asked for, and computes from now on."""
        if number is not None and number < len(self._accesses):
            self._accesses[number].bound_s = bound_s

    def gathered(self, number: int | None, table: int, n_bytes: int, gathered_at: Any) -> None:
        """Notes that an access was for rows of `table`, `n_bytes` of it, and when these were there."""
        if number is not None and number < len(self._accesses):
            self._accesses[number].table = table
            self._accesses[number].gathered_bytes = n_bytes
            self._accesses[number].gathered_at = gathered_at

    def end(self, number: int | None, done_s: Any = None) -> None:
        """Notes that the operator is done."""
        if number is not None and number in self._open:
            self._open.remove(number)
            self._accesses[number].done_s = done_s

    def drop(self, number: int | None) -> None:
        """Forgets an access that failed."""
        self.end(number)
        if number == len(self._accesses) - 1:
            self._accesses.pop()
            for other in self._open:
                self._accesses[other].n_spanned -= 1

    def uses(
        self,
        ended_s: Any,
        *,
        keep: Callable[[int], bool],
        seconds: Callable[[Any, Any], float] = lambda start, end: end - start,
    ) -> list[Use]:
        """Returns the uses of the segments to `keep`, with the seconds of compute after each.

        What came before the first use is added to the last one: passes repeat.
        """
        uses: list[Use] = []
        kept_before = [0]
        for access in self._accesses:
            is_use = access.table is not None or any(keep(index) for index in access.segments)
            kept_before.append(kept_before[-1] + is_use)
        lead_s = max(seconds(self.began_s, self._accesses[0].began_s), 0.0) if self._accesses else 0.0
        for number, access in enumerate(self._accesses):
            next_s = self._accesses[number + 1].began_s if number + 1 < len(self._accesses) else ended_s
            compute_s = max(seconds(access.bound_s, next_s), 0.0)
            segments = tuple(index for index in access.segments if keep(index))
            if segments or access.table is not None:
                end = min(number + access.n_spanned, len(self._accesses))
                n_spanned = kept_before[end] - kept_before[number]
                held_s = None
                if access.done_s is not None:
                    held_s = max(seconds(access.bound_s, access.done_s), 0.0)
                use = Use(segments, compute_s, n_spanned, access.table, access.gathered_bytes, held_s)
                if access.gathered_at is not None:
                    gathered_s = max(seconds(access.bound_s, access.gathered_at), 0.0)
                    use = replace(use, gathered_s=min(gathered_s, compute_s))
                uses.append(use)
            elif uses:
                uses[-1] = replace(uses[-1], compute_s=uses[-1].compute_s + compute_s)
            else:
                lead_s += compute_s
        if uses:
            uses[-1] = replace(uses[-1], compute_s=uses[-1].compute_s + lead_s)
        return uses
