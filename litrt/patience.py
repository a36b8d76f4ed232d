"""How long a read may take before it is taken to have stalled: what is normal for a store, it says itself."""

from __future__ import annotations

from collections import deque
from typing import Any

from litrt.errors import StalledReadError

READ_TIMEOUT_S = 8.0
"""A disk that has not answered by then will not; nor a network, if it answered faster before."""

LOOK_S = 0.5
"""How often whoever waits looks whether something has stalled."""

_MOST_TIMES = 4
"""How many times as long as others a read may take."""

_LEAST_BPS = 4e6
"""What a store is expected to deliver before it has delivered anything."""

_N_LATELY = 16


class Patience:
    """Tells how long reads may be waited for.

    Args:
        timeout_s: Seconds, at least.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._lately_s: deque[float] = deque(maxlen=_N_LATELY)

    def ended(self, took_s: float, bytes_under_way: int) -> None:
        """Notes a read that has ended, unless it had stalled, or its process was stopped meanwhile."""
        if took_s <= self.limit_s(bytes_under_way):
            self._lately_s.append(took_s)

    def limit_s(self, bytes_under_way: int) -> float:
        """Returns how many seconds to wait for reads of so many bytes in all: four times what the last ones took."""
        if self._lately_s:
            return max(self.timeout_s, _MOST_TIMES * max(self._lately_s))
        return self.timeout_s + bytes_under_way / _LEAST_BPS


def stalled(piece: Any, waited_s: float) -> StalledReadError:
    """Returns the error for a piece, with a name and a file, that was waited for too long."""
    return StalledReadError(
        f"weight {piece.name!r}: a read of {piece.file} has not ended in {waited_s:.1f} s. Check the disk or the "
        "network; if they are that slow, pass a larger read_timeout_s to litrt.Runtime.",
        name=piece.name,
        file=piece.file,
    )
