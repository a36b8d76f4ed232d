"""Uses of a few rows of a weight that is not there: only these are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from litrt.bindings import Binding
from litrt.gather import Rows
from litrt.rowops import Grouped, request


class Source(Protocol):
    """Where placeholders get their tensors: the pipeline."""

    def acquire(self, indices: tuple[int, ...]) -> Binding:
        """Returns tensors for segments, pinned until `release`."""
        ...

    def release(self, binding: Binding) -> None:
        """Says that an operator is done with them."""
        ...

    def acquire_rows(self, index: int, ranges: Sequence[tuple[int, int]]) -> Binding | None:
        """Returns a tensor with ranges of a segment's elements, or None where the whole of it should be used."""
        ...

    def n_at_once(self, index: int, ranges: Sequence[tuple[int, int]]) -> int:
        """Returns how many of those, from the first on, to ask for together."""
        ...

    def gather(self, index: int, rows: Rows) -> torch.Tensor | None:
        """Returns rows of a segment, or None where the whole of it should be used."""
        ...

    def restore(self, binding: Binding) -> None:
        """Reads the values of tensors that were written to again."""
        ...


Table = Any
"""A placeholder, which is defined above this module."""


def gather(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], table: Table) -> Any:
    """Returns rows of a table where only these should be read, or NotImplemented."""
    with torch._C.DisableTorchFunctionSubclass():
        size, first, is_contiguous = table.size(), table.storage_offset(), table.is_contiguous()
    if not is_contiguous:
        return NotImplemented
    asked = request(func, args, kwargs, table, size)
    if asked is None:
        return NotImplemented
    rows = Rows(int(first), math.prod(size[1:]), asked.numbers.numpy())
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        if not rows.n_elements or not len(rows.numbers):
            return asked.result(torch.empty(0, dtype=table.dtype, device=table.device))
        taken = table._litrt_source.gather(table._litrt_index, rows)
        return NotImplemented if taken is None else asked.result(taken)


def multiply_groups(product: Grouped, weight: Table) -> Any:
    """Returns a product with those matrices of `weight` alone that have rows to multiply, or NotImplemented.

    Each group has a product of its own in any case, so that matrices for which there is no room together can be there
    one after the other.
    """
    with torch._C.DisableTorchFunctionSubclass():
        size, stride, first = weight.size(), weight.stride(), weight.storage_offset()
        n_elements = math.prod(weight._litrt_shape)
    n_inner = n_elements // max(weight._litrt_shape[0], 1)
    if len(size) != 3 or weight.device.type != "cpu" or not n_elements or (stride[0] != n_inner and size[0] > 1):
        return NotImplemented
    ends = product.ends.tolist()
    used = [number for number, end in enumerate(ends) if end > (ends[number - 1] if number else 0)]
    if len(ends) != size[0] or not used:
        return NotImplemented
    before, inner = divmod(int(first), n_inner)
    source, index = weight._litrt_source, weight._litrt_index
    ranges = [((before + number) * n_inner, (before + number + 1) * n_inner) for number in used]
    products = []
    begin = 0  # of the rows that are left
    while used:
        n_groups = source.n_at_once(index, ranges)
        binding = source.acquire_rows(index, ranges[:n_groups])
        if binding is None:
            return NotImplemented
        end = ends[used[n_groups - 1]] if n_groups < len(used) else len(product.rows)
        matrices = None
        try:
            # Blocks can have matrices beside those asked for: groups without rows to multiply.
            there = [row - before for start, stop in binding.ranges for row in range(start // n_inner, stop // n_inner)]
            reached = [ends[min(row, len(ends) - 1)] if row >= 0 else 0 for row in there]
            reached = [min(max(row, begin), end) - begin for row in reached]
            matrices = binding.tensors[0].as_strided((len(there), *size[1:]), (n_inner, *stride[1:]), inner)
            with torch.no_grad():
                products.append(product.call(product.rows[begin:end], matrices, product.ends.new_tensor(reached)))
        finally:
            del matrices
            source.release(binding)
        used, ranges, begin = used[n_groups:], ranges[n_groups:], end
    return torch.cat(products) if len(products) > 1 else products[0]
