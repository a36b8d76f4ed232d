"""Where a pass is in the plan: matches what operators ask for with what was predicted."""

from __future__ import annotations

from collections.abc import Sequence


class Cursor:
    """A position in a cyclic sequence of steps, counted on from pass to pass and never backwards.

    An access that is not the expected one leaves the position where it is and remembers where else it occurs; when
    the next access is what follows there, the position jumps forward to it. One surprise alone (a routed expert) thus
    costs one fault, and a skipped stretch (an early exit, a decoder called without its encoder) two.

    Args:
        steps: The segments of every step of a pass; where there are none, nothing is ever expected.
    """

    def __init__(self, steps: Sequence[tuple[int, ...]]) -> None:
        self.position = 0
        self.n_mismatches = 0
        self._steps = tuple(steps)
        self._n_steps = max(len(self._steps), 1)  # positions of a pass
        self._elsewhere: int | None = None
        self._occurrences: dict[tuple[int, ...], list[int]] = {}
        for number, segments in enumerate(self._steps):
            self._occurrences.setdefault(segments, []).append(number)

    @property
    def expected(self) -> tuple[int, ...]:
        """The segments of the step that should come next; none where there are no steps."""
        return self._steps[self.step] if self._steps else ()

    @property
    def step(self) -> int:
        """The number of that step in its pass."""
        return self.position % self._n_steps

    def match(self, segments: tuple[int, ...]) -> int | None:
        """Returns the absolute number of the step that `segments` are, and moves behind it, or None."""
        if self.expected == segments:
            found = self.position
        elif self._elsewhere is not None and self._steps[self._elsewhere % len(self._steps)] == segments:
            found = self._elsewhere
        else:
            self.n_mismatches += 1
            following = self._next_occurrence(segments)
            self._elsewhere = following + 1 if following is not None else None
            return None
        self.position = found + 1
        self._elsewhere = None
        return found

    def begin_pass(self) -> None:
        """Moves to the start of the next pass, unless a pass has just ended."""
        self.position = -(-self.position // self._n_steps) * self._n_steps
        self._elsewhere = None

    def _next_occurrence(self, segments: tuple[int, ...]) -> int | None:
        numbers = self._occurrences.get(segments)
        if not numbers:
            return None
        start = self.step
        distance = min((number - start) % self._n_steps for number in numbers)
        return self.position + distance
