"""Tensors that consist of other tensors, such as torchao's quantised weights: their parts are stored and served.

torch calls them traceable wrapper subclasses: `__tensor_flatten__` names the attributes that hold the parts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_wrapper(tensor: object) -> bool:
    """Says whether a tensor consists of others."""
    return isinstance(tensor, torch.Tensor) and is_traceable_wrapper_subclass(tensor)


def parts(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields what a tensor consists of, with names: `name.qdata`, `name.scale`; one that is no wrapper, as it is."""
    if not is_wrapper(tensor):
        yield name, tensor
        return
    attributes, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    for attribute in attributes:
        yield from parts(f"{name}.{attribute}", getattr(tensor, attribute))
