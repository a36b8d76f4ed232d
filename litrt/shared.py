"""One budget for several runtimes of a process: each has a share of it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from litrt.errors import BudgetError, LitrtError
from litrt.memory import available_bytes
from litrt.units import format_bytes, parse_bytes


@dataclass(frozen=True, slots=True)
class Need:
    """What one runtime can do with.

    Attributes:
        least_bytes: The smallest budget that works.
        most_bytes: The budget from which on all its weights stay.
    """

    least_bytes: int
    most_bytes: int


def divide(budget_bytes: int, needs: Sequence[Need]) -> list[int]:
    """Returns a share of `budget_bytes` for each of `needs`: the same part of its most, but no less than its least.

    Raises:
        BudgetError: If it is too small for the least of all.
    """
    least_bytes = sum(need.least_bytes for need in needs)
    if least_bytes > budget_bytes:
        raise BudgetError(
            f"budget {format_bytes(budget_bytes)} cannot be shared by {len(needs)} runtimes that need "
            f"{format_bytes(least_bytes)} ({least_bytes} bytes) at least.",
            budget_bytes=budget_bytes,
            needed_bytes=least_bytes,
        )
    if budget_bytes >= sum(max(need.least_bytes, need.most_bytes) for need in needs):
        return [max(need.least_bytes, need.most_bytes) for need in needs]
    # Those that the common part leaves below their least get that, and the others share what is left.
    at_least: set[int] = set()
    while True:
        left_bytes = budget_bytes - sum(needs[number].least_bytes for number in at_least)
        most_bytes = sum(need.most_bytes for number, need in enumerate(needs) if number not in at_least)
        shares = [
            need.least_bytes if number in at_least else min(left_bytes * need.most_bytes // most_bytes, need.most_bytes)
            for number, need in enumerate(needs)
        ]
        below = {number for number, need in enumerate(needs) if shares[number] < need.least_bytes}
        if not below:
            return shares
        at_least |= below


class Member(Protocol):
    """A runtime, as the shared budget sees it."""

    def _need(self) -> Need: ...

    def _take_share(self, n_bytes: int, *, wait: bool) -> bool: ...

    @property
    def _has_bytes(self) -> int: ...

    @property
    def _is_in_pass_here(self) -> bool: ...


@dataclass(eq=False, slots=True)
class _Share:
    member: weakref.ref[Member]
    n_bytes: int

    def shrink(self, member: Member, n_bytes: int) -> None:
        """Makes it smaller, between two passes of the member."""
        try:
            member._take_share(n_bytes, wait=True)
        except LitrtError:
            self.n_bytes = member._has_bytes
            if self.n_bytes > n_bytes:
                raise
            # It has less, and what it could not read it meets again in its next pass.
        self.n_bytes = n_bytes

    def grow(self, member: Member, n_bytes: int) -> None:
        """Makes it larger, unless the member is in a pass."""
        try:
            if member._take_share(n_bytes, wait=False):
                self.n_bytes = n_bytes
        except LitrtError:
            self.n_bytes = member._has_bytes  # it may have grown; what it could not read it meets again


class SharedBudget:
    """A budget that several runtimes share, on the same device.

        shared = litrt.SharedBudget("6GB")
        encoder = litrt.Runtime(TextEncoder, "encoder.zarr", budget=shared)
        decoder = litrt.Runtime(Decoder, "decoder.zarr", budget=shared)

    Each gets the same part of what its weights take, and what it needs at least. When one is made, the others give
    memory back first, between their passes; when one is closed, its share goes to the others.

    Args:
        budget: `"6GB"`, an int of bytes, or `"auto"` for half of the host's memory that is available now.

    Raises:
        BudgetError: If `budget` cannot be read.
    """

    def __init__(self, budget: int | str) -> None:
        self.budget_bytes = available_bytes() // 2 if budget == "auto" else parse_bytes(budget, of_bytes=0)
        self._lock = threading.Lock()
        self._dividing = threading.Lock()  # held while runtimes change their budgets; taken before their locks
        self._shares: list[_Share] = []

    @property
    def shares(self) -> list[int]:
        """Bytes of every runtime, in the order in which they were made."""
        return [share.n_bytes for _, share in self._members()]

    def _members(self) -> list[tuple[Member, _Share]]:
        with self._lock:
            found = [(share.member(), share) for share in self._shares]
            self._shares = [share for member, share in found if member is not None]
        return [(member, share) for member, share in found if member is not None]

    def join(self, newcomer: Member, need: Need) -> int:
        """Returns the share of another runtime, once the others have made room for it.

        Raises:
            BudgetError: If the budget is too small for all of them.
            LitrtError: If called in a pass of one of them.
        """
        if any(member._is_in_pass_here for member, _ in self._members()):
            raise LitrtError(
                "cannot make another runtime of a shared budget in a pass of one: make it before or after."
            )
        with self._dividing:
            members = self._members()
            *shares, own = divide(self.budget_bytes, [*(member._need() for member, _ in members), need])
            try:
                for (member, share), n_bytes in zip(members, shares, strict=True):
                    if n_bytes < share.n_bytes:
                        share.shrink(member, n_bytes)
            except BudgetError:
                self._grow()
                raise
            with self._lock:
                self._shares.append(_Share(weakref.ref(newcomer), own))
            return own

    def leave(self, leaver: Member) -> None:
        """Gives the share of a runtime to the others, as far as they are between passes."""
        with self._lock:
            self._shares = [share for share in self._shares if share.member() not in (None, leaver)]
        # Whoever divides meanwhile may wait for a pass that this thread is in.
        if self._dividing.acquire(blocking=False):
            try:
                self._grow()
            finally:
                self._dividing.release()

    def _grow(self) -> None:
        members = self._members()
        for (member, share), n_bytes in zip(
            members, divide(self.budget_bytes, [member._need() for member, _ in members]), strict=True
        ):
            if n_bytes > share.n_bytes:
                share.grow(member, n_bytes)
