"""Where the tensors of a conversion come from: one at a time, and none is kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from litrt.errors import CorruptWeightError


@dataclass(frozen=True)
class Source:
    """Named tensors, given one at a time.

    Attributes:
        names: All names, in order.
        aliases: Names of tensors that share the memory of an earlier one, and the name of that one.
        sizes: Elements and dtype of each tensor, where they are known before it is fetched.
        fetch: Returns a tensor of a name that is not an alias. In order, each file is opened once.
        release: Called when the tensor that was fetched is no longer needed.
        files: Those that it is in, if it is in files.
    """

    names: tuple[str, ...]
    fetch: Callable[[str], torch.Tensor]
    aliases: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, tuple[int, torch.dtype]] | None = None
    release: Callable[[torch.Tensor], None] = lambda tensor: None
    files: tuple[Path, ...] = ()


def read_into(path: Path, fd: int, name: str, tensor: torch.Tensor, position: int) -> None:
    """Fills the bytes of a tensor from a byte of a file on.

    Raises:
        CorruptWeightError: If the file ends before that.
    """
    view = tensor.numpy().data
    while len(view):
        n_read = os.preadv(fd, [view], position)
        if n_read == 0:
            raise CorruptWeightError(
                f"{path} is truncated at byte {position}, inside {name!r}. Download it again.",
                name=name,
                file=str(path),
            )
        position += n_read
        view = view[n_read:]
