"""Torch's functions that take rows of a table, and which rows they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

_aten = torch.ops.aten
_TABLE_AT: dict[Any, int] = {
    F.embedding: 1,
    torch.embedding: 0,
    torch.index_select: 0,
    torch.Tensor.index_select: 0,
    torch.Tensor.__getitem__: 0,
    _aten.embedding.default: 0,
    _aten.index_select.default: 0,
    _aten.index.Tensor: 0,
}
_NAMES: dict[Any, str] = {F.embedding: "weight", torch.embedding: "weight", _aten.embedding.default: "weight"}
_GROUPED = frozenset(
    found for found in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if found is not None
)
_INDEX_DTYPES = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool})


@dataclass(frozen=True)
class Request:
    """Rows of a table that a call takes.

    Attributes:
        numbers: Which, in the order in which they lie in the memory of the result.
        shape: The shape of the result, its axes in that order.
        order: The axes of the result, in that order.
    """

    numbers: torch.Tensor
    shape: tuple[int, ...]
    order: tuple[int, ...]

    def result(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the result of the call from the elements of its rows."""
        axes = sorted(range(len(self.order)), key=lambda axis: self.order[axis])
        return rows.view(self.shape).permute(axes)


def may_take_rows(func: Callable[..., Any]) -> bool:
    """Says whether some calls of `func` take rows of a table, or matrices of a stack."""
    return func in _TABLE_AT or func in _GROUPED


def table_of(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Returns the table that a call takes rows of, or None where it does something else."""
    position = _TABLE_AT.get(func)
    if position is None or kwargs.get("out") is not None:
        return None
    if len(args) > position:
        return args[position]
    return kwargs.get(_NAMES.get(func, "input"), kwargs.get("self"))


def request(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], table: Any, size: Sequence[int]
) -> Request | None:
    """Returns the rows that a call takes of `table`, which has `size`, or None where it takes something else.

    Raises:
        Exception: What the call itself raises, where it is not valid.
    """
    if not size or not _is_of_rows(func, args, kwargs, len(size)):
        return None

    def call(other: torch.Tensor) -> torch.Tensor:
        result = func(
            *(_on_host(arg, table, other) for arg in args),
            **{key: _on_host(arg, table, other) for key, arg in kwargs.items()},
        )
        assert isinstance(result, torch.Tensor)
        return result

    # The same call on the numbers of the rows: what it says of them, it would say of the rows.
    n_inner = len(size) - 1
    with torch._C.DisableTorchFunctionSubclass(), torch.inference_mode(False), torch.no_grad():
        try:
            numbers = call(torch.arange(size[0]).view(-1, *[1] * n_inner))
        except Exception:
            call(torch.empty(1).expand(size))  # with the size of the table in its words
            return None
        for _ in range(n_inner):
            numbers = numbers[..., 0]
        order = sorted(range(numbers.dim()), key=numbers.stride, reverse=True)
        numbers = numbers.permute(order)
        shape = (*numbers.shape, *size[1:])
        return Request(numbers.reshape(-1), shape, (*order, *range(len(order), len(shape))))


def _on_host(arg: Any, table: Any, other: torch.Tensor) -> Any:
    if arg is table:
        return other
    if isinstance(arg, torch.Tensor):
        return arg.cpu()
    if type(arg) in (list, tuple):
        return type(arg)(_on_host(item, table, other) for item in arg)
    return arg


def _is_of_rows(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], n_axes: int) -> bool:
    if func is torch.Tensor.__getitem__:
        index = args[1] if type(args[1]) is tuple else (args[1],)
        return bool(index) and _is_row_index(index[0]) and len(index) <= n_axes + 1 and all(map(_is_all, index[1:]))
    if func is _aten.index.Tensor:
        return _is_row_index(args[1][0]) and all(item is None for item in args[1][1:])
    if func in (torch.index_select, torch.Tensor.index_select, _aten.index_select.default):
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        return isinstance(dim, int) and dim in (0, -n_axes)
    return n_axes == 2


def _is_row_index(index: Any) -> bool:
    if isinstance(index, list) and not index:
        return True
    if isinstance(index, list | np.ndarray):
        try:
            index = torch.as_tensor(index)
        except (TypeError, ValueError, RuntimeError):
            return False
    if type(index) is not torch.Tensor or index.dtype not in _INDEX_DTYPES or index.is_meta:
        return False
    return index.dim() == 1 or (index.dim() > 1 and index.dtype not in (torch.bool, torch.uint8))


def _is_all(item: Any) -> bool:
    return item is Ellipsis or (isinstance(item, slice) and item == slice(None))


@dataclass(frozen=True)
class Grouped:
    """A product of groups of rows, each with a matrix of its own.

    Attributes:
        rows: What is multiplied.
        matrices: The matrices, one for each group.
        ends: Where the rows of each group end.
        call: Makes the product of other rows, with other matrices and ends.
    """

    rows: torch.Tensor
    matrices: Any
    ends: torch.Tensor
    call: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def grouped(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Grouped | None:
    """Returns what a call multiplies in groups, or None where it does something else."""
    if func not in _GROUPED:
        return None
    left_name, right_name = ("mat_a", "mat_b") if func is getattr(F, "grouped_mm", None) else ("self", "mat2")
    given = {**dict(zip((left_name, right_name, "offs", "bias", "out_dtype"), args, strict=False)), **kwargs}
    left, right, ends = given.pop(left_name, None), given.pop(right_name, None), given.pop("offs", None)
    if type(left) is not torch.Tensor or left.dim() != 2 or type(ends) is not torch.Tensor or ends.dim() != 1:
        return None
    if given.get("bias") is not None:
        return None
    return Grouped(left, right, ends, lambda rows, matrices, ends: func(rows, matrices, offs=ends, **given))
