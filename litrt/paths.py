"""The paths that passes take through a model, and which of them comes next.

A path is known by what it uses of what streams, in order. Which one a pass will take is guessed, from what its inputs
look like and from the path before it; a wrong guess costs time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from litrt.plan import Plan
from litrt.trace import Use

_MOST_PATHS = 8
"""Paths that have plans; the one that was taken least lately makes room, first of those that were not recorded."""

_MOST_GUESSES = 256

_MOST_CHARS = 32
"""Strings up to this length are flags."""


@dataclass(eq=False, slots=True)
class Path:
    """One of them.

    Attributes:
        uses: What a warm-up recorded, all that it used; None for one that passes have strayed to since.
        plan: What passes on it do.
        measured: Of the passes that followed the plan: their uses, bytes read, and seconds of reading.
    """

    uses: tuple[Use, ...] | None = None
    plan: Plan | None = None
    measured: list[tuple[list[Use], int, float]] = field(default_factory=list)


class Paths:
    """Those of one model."""

    def __init__(self) -> None:
        self._paths: list[Path] = []  # the one that was taken last is last
        self._before: Path | None = None  # the one that the last pass took
        self._guesses: OrderedDict[tuple[Path | None, Hashable], Path] = OrderedDict()

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def recorded(self) -> list[Path]:
        """Those that warm-ups recorded, the last one last."""
        return [path for path in self._paths if path.uses is not None]

    def record(self, uses: Sequence[Use], signature: Hashable) -> Path:
        """Returns the path that a warm-up has recorded, known from now on; those that have strayed are forgotten.

        Args:
            uses: All that the pass used.
            signature: What its inputs looked like.
        """
        key = _key(uses)
        path = next((path for path in self.recorded if path.uses is not None and _key(path.uses) == key), Path())
        path.uses = tuple(uses)
        self._paths = [other for other in self.recorded if other is not path]
        self._add(path)
        self._before = None
        self._took(path, signature)
        return path

    def forget_strayed(self) -> None:
        """Forgets what no warm-up has recorded."""
        self._paths = self.recorded
        self._forget_unknown()

    def stray(self, plan: Plan) -> Path:
        """Returns a new path, for passes that do what `plan` says."""
        path = Path(plan=plan)
        self._add(path)
        return path

    def find(self, uses: Sequence[Use]) -> Path | None:
        """Returns the path whose plan has the steps of a pass, of which `uses` are those of what streams."""
        steps = [use.segments for use in uses if use.segments]
        for path in reversed(self._paths):
            if path.plan is not None and [step.segments for step in path.plan.steps] == steps:
                return path
        return None

    def took(self, path: Path, signature: Hashable) -> Path:
        """Notes that a pass with such inputs took `path`; returns the one that will probably come next."""
        self._paths.remove(path)
        self._paths.append(path)
        self._took(path, signature)
        self._before = path
        return self._guesses.get((path, None), path)

    def expected(self, signature: Hashable) -> Path | None:
        """Returns the path that a pass with such inputs will probably take, or None where nothing says."""
        return self._guesses.get((self._before, signature)) or self._guesses.get((None, signature))

    def _took(self, path: Path, signature: Hashable) -> None:
        keys: list[tuple[Path | None, Hashable]] = [(None, signature)]
        if self._before is not None:
            keys += [(self._before, signature), (self._before, None)]
        for key in keys:
            self._guesses[key] = path
            self._guesses.move_to_end(key)
        while len(self._guesses) > _MOST_GUESSES:
            self._guesses.popitem(last=False)

    def _add(self, path: Path) -> None:
        if len(self._paths) == _MOST_PATHS:
            self._paths.remove(next((old for old in self._paths if old.uses is None), self._paths[0]))
        self._paths.append(path)
        self._forget_unknown()

    def _forget_unknown(self) -> None:
        known = {id(path) for path in self._paths}
        if self._before is not None and id(self._before) not in known:
            self._before = None
        for key, guess in list(self._guesses.items()):
            if id(guess) not in known or (key[0] is not None and id(key[0]) not in known):
                del self._guesses[key]


def _key(uses: Sequence[Use]) -> tuple[tuple[tuple[int, ...], int | None], ...]:
    return tuple((use.segments, use.table) for use in uses)


def signature(args: Sequence[object], kwargs: Mapping[str, object]) -> Hashable:
    """Returns what inputs look like, for what may decide on the path: names, kinds, flags, and lengths of one.

    Other lengths are left out: they differ from pass to pass.
    """
    return tuple(_look(arg) for arg in args), tuple((name, _look(kwargs[name])) for name in sorted(kwargs))


def _look(value: object) -> Hashable:
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return tuple(length == 1 for length in shape)
    if value is None or isinstance(value, bool | int) or (isinstance(value, str) and len(value) <= _MOST_CHARS):
        return type(value), value
    return type(value).__qualname__
