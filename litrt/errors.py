"""The exceptions that litrt raises.

    LitrtError
    ├── BudgetError(ValueError)           a budget that cannot be read, or cannot hold what is needed
    ├── DeviceError(ValueError)           a device that litrt cannot serve weights on
    ├── StoreError(ValueError)            a path that is not a litrt store, or a store that cannot be written
    │   └── SkeletonError                 a store whose names or shapes are not the model's
    ├── WeightNotFoundError(KeyError)     a name that the store does not have
    ├── CorruptWeightError(OSError)       a chunk that is missing, short or damaged
    │   └── StoreChangedError             a chunk that is whole, and not the one that the store had
    ├── StalledReadError(TimeoutError)    a read that has not ended in time
    ├── TraceMismatchError(RuntimeError)  an access that the trace did not predict, in strict mode
    ├── WeightWriteError(RuntimeError)    an in-place write to a weight that litrt serves
    └── ClosedError(RuntimeError)         a use of a weight whose runtime was closed

Each derives from the builtin that a caller would guess, and carries the facts of its message as attributes.
"""

from __future__ import annotations


class LitrtError(Exception):
    """The root of every error that litrt raises on purpose."""


class BudgetError(LitrtError, ValueError):
    """A budget that cannot be read, or that cannot hold what has to be held.

    Attributes:
        budget_bytes: The budget that failed, or None where it could not be read.
        needed_bytes: The smallest budget that would have worked, or None where that is unknown.
    """

    def __init__(self, message: str, *, budget_bytes: int | None = None, needed_bytes: int | None = None) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.needed_bytes = needed_bytes


class DeviceError(LitrtError, ValueError):
    """A device that litrt cannot serve weights on, or that is not there."""


class StoreError(LitrtError, ValueError):
    """A path that is not a litrt store, a store that is incomplete, or one that cannot be written."""


class SkeletonError(StoreError):
    """A store whose names or shapes are not those of the model.

    Attributes:
        missing: Names that the model has and the store lacks.
        unexpected: Names that the store has and the model lacks.
        misshaped: Name to (shape in the model, shape in the store).
    """

    def __init__(
        self,
        message: str,
        *,
        missing: tuple[str, ...] = (),
        unexpected: tuple[str, ...] = (),
        misshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
    ) -> None:
        super().__init__(message)
        self.missing = missing
        self.unexpected = unexpected
        self.misshaped = misshaped or {}


class WeightNotFoundError(LitrtError, KeyError):
    """A name that the store does not have.

    Attributes:
        name: The name that was asked for.
    """

    def __init__(self, message: str, *, name: str) -> None:
        super().__init__(message)
        self.name = name

    def __str__(self) -> str:
        # KeyError prints the repr of its argument, which would put quotes around a sentence.
        return str(self.args[0])


class CorruptWeightError(LitrtError, OSError):
    """A chunk of a weight that is missing, short, unreadable or fails its checksum.

    Attributes:
        name: The tensor.
        file: The chunk file, or the key of the chunk in a store that is not a directory.
    """

    def __init__(self, message: str, *, name: str, file: str) -> None:
        super().__init__(message)
        self.name = name
        self.file = file


class StoreChangedError(CorruptWeightError):
    """A chunk that is whole, and has other values than the store had when it was opened.

    The store was replaced, or a chunk of it by another one.
    """


class StalledReadError(LitrtError, TimeoutError):
    """A read that has not ended in time: the disk or the network does not answer, or is very slow.

    It cannot be broken off. Once it has ended, its weight is served like any other.

    Attributes:
        name: The tensor.
        file: The chunk file, or the key of the array in a store that is not a directory.
    """

    def __init__(self, message: str, *, name: str, file: str) -> None:
        super().__init__(message)
        self.name = name
        self.file = file


class TraceMismatchError(LitrtError, RuntimeError):
    """An access that the recorded trace did not predict, raised under `strict=True`.

    Attributes:
        expected: Names of the weights that the trace expects next.
        actual: Names of the weights that were used instead.
        step: Position in the trace, counted from 0.
    """

    def __init__(self, message: str, *, expected: tuple[str, ...], actual: tuple[str, ...], step: int) -> None:
        super().__init__(message)
        self.expected = expected
        self.actual = actual
        self.step = step


class WeightWriteError(LitrtError, RuntimeError):
    """An in-place write to a weight that litrt serves from a store: weights are read-only.

    Attributes:
        name: The weight.
    """

    def __init__(self, message: str, *, name: str) -> None:
        super().__init__(message)
        self.name = name


class ClosedError(LitrtError, RuntimeError):
    """A use of a runtime, or of a weight whose runtime was closed."""
