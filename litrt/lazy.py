"""The tensors of a checkpoint or of a store, each read when it is asked for."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping

import torch

from litrt.checkpoint import open_source
from litrt.errors import ClosedError, WeightNotFoundError


class LazyStateDict(Mapping[str, torch.Tensor]):
    """A mapping of names to tensors that are read each time they are asked for. Made by `lazy_state_dict`.

    A context manager; `close` closes its files. Threads: any number may use it, one at a time reads.

    Attributes:
        path: What it reads.
        aliases: Names that share the values of another name, and that other name.
    """

    def __init__(
        self,
        path: str,
        names: tuple[str, ...],
        aliases: Mapping[str, str],
        fetch: Callable[[str], torch.Tensor],
        stack: contextlib.ExitStack,
    ) -> None:
        self.path = path
        self.aliases = dict(aliases)
        self._names = dict.fromkeys(names)
        self._fetch = fetch
        self._stack = stack
        self._lock = threading.Lock()
        self._is_closed = False

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise WeightNotFoundError(f"{self.path} has no weight {name!r}, but {len(self)} others.", name=name)
        with self._lock:
            if self._is_closed:
                raise ClosedError(f"{self.path} is closed: call litrt.lazy_state_dict again.")
            return self._fetch(self.aliases.get(name, name))

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"LazyStateDict({self.path!r}, {len(self)} tensors)"

    def close(self) -> None:
        """Closes its files; tensors that it has given remain. Safe to call twice."""
        with self._lock:
            self._is_closed = True
            self._stack.close()

    def __enter__(self) -> LazyStateDict:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def lazy_state_dict(path: str | os.PathLike[str]) -> LazyStateDict:
    """Returns the tensors of a checkpoint or of a store as a mapping that reads each when it is asked for.

    It keeps none. Names, `len` and `in` read no tensor. A tensor of a safetensors file or of a store has memory of its
    own; one of a torch file is mapped, and read when it is used: only files of before torch 1.6 are loaded whole.

    Args:
        path: A store; or a checkpoint, as for `litrt.convert`.

    Raises:
        FileNotFoundError: If there is none.
        StoreError: If it is neither a store nor a checkpoint. A tensor that litrt cannot read, such as a quantised one
            of GGUF, raises it when it is asked for.
        CorruptWeightError: If a file is truncated. A damaged chunk of a store raises it when it is read.
    """
    label = os.fspath(path)
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(open_source(path))
        kept = stack.pop_all()
    return LazyStateDict(label, source.names, source.aliases, source.fetch, kept)
