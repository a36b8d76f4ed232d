"""Weights that are not there: tensors that load their bytes when, and only when, an operator needs them.

A placeholder reports its true shape, dtype and device. Operators are intercepted at `__torch_function__`, above the
point where they choose a kernel, so the kernel that runs is the one that the plain model runs; `__torch_dispatch__`
catches what C++ code calls. View operators give a placeholder of the view. Nothing ever computes with a substitute.

Note on identity. A placeholder is served as a parameter (`isinstance(w, nn.Parameter)`) or as a buffer. Where a weight
stays in memory, `torch.utils.swap_tensors` puts a plain tensor in the place of the placeholder object, so that every
reference to it, also one taken in a constructor, becomes a plain tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn, Self

import torch

from litrt.borrow import Stored, call, call_directly, refuse_write, was_swapped
from litrt.compiled import uncompiled
from litrt.device import contiguous_strides
from litrt.errors import BudgetError, LitrtError
from litrt.gradients import asked_for, is_transformed, refused
from litrt.operators import (
    ADDRESSES,
    DATA_SET,
    DISPATCH_VIEWS,
    GRAD_SETTERS,
    METADATA,
    REQUIRES_GRAD_GET,
    VIEWS,
    may_write,
    written,
)
from litrt.rowops import grouped, may_take_rows, table_of
from litrt.rows import Source, gather, multiply_groups
from litrt.views import lazy_view

_SET = torch.ops.aten.set_.source_Tensor


class Placeholder(Stored):
    """A stored tensor, or a view of one, that is loaded on use.

    Args:
        source: Serves segment `index`.
        index: The segment.
        name: The tensor's name, for messages.
        meta: A meta tensor with the geometry of this view of the segment.
        device: The device it reports.
        is_param: Be an `nn.Parameter` to `isinstance`.
        requires_grad: What the parameter says; kernels choose by it, also where no gradient is recorded.
    """

    _is_param: bool

    @staticmethod
    def __new__(
        cls,
        source: Source,
        index: int,
        name: str,
        meta: torch.Tensor,
        stored_shape: tuple[int, ...],
        device: torch.device,
        *,
        is_param: bool = False,
        requires_grad: bool = False,
    ) -> Self:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            meta.size(),
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=device,
            requires_grad=False,
        )
        torch._C._set_throw_on_mutable_data_ptr(self)  # C++ code that wants its memory gets an error, not null
        self._litrt_source = source
        self._litrt_index = index
        self._litrt_name = name
        self._litrt_shape = stored_shape
        self._litrt_requires_grad = requires_grad
        is_dense = meta.size() == stored_shape and meta.storage_offset() == 0
        self._litrt_is_whole = is_dense and meta.is_contiguous()
        self._litrt_is_plain = is_dense and meta.stride() == contiguous_strides(stored_shape)
        if is_param:
            self._is_param = True
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass  # all is done in __new__

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        try:
            return _intercept(func, args, kwargs or {})
        except AttributeError as error:
            if not was_swapped(error):
                raise
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        try:
            return cls._dispatch(func, args, kwargs or {})
        except AttributeError as error:
            if not was_swapped(error):
                raise
            return func(*args, **(kwargs or {}))

    @staticmethod
    def _dispatch(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if func in DISPATCH_VIEWS:
            views = _view(func, args, kwargs)
            if views is not NotImplemented:
                return views
        if func is _SET and args[0] is args[1]:
            return args[0]  # torch's parametrizations do that, where they change nothing
        rows = _part_of(func, args, kwargs)
        if rows is not NotImplemented:
            return rows
        _check_writes(func, args, kwargs)
        return call(func, args, kwargs)

    def _litrt_view(self, geometry: torch.Tensor) -> Placeholder:
        """Returns a placeholder for the view of the same segment that `geometry` is."""
        with torch._C.DisableTorchFunctionSubclass():
            device = self.device
        return Placeholder(self._litrt_source, self._litrt_index, self._litrt_name, geometry, self._litrt_shape, device)

    @classmethod
    def of(cls, placeholder: Placeholder) -> Self:
        """Returns one for the same weight."""
        with torch._C.DisableTorchFunctionSubclass():
            meta = torch.empty(placeholder._litrt_shape, dtype=placeholder.dtype, device="meta").as_strided(
                placeholder.size(), placeholder.stride(), placeholder.storage_offset()
            )
            return cls(
                placeholder._litrt_source,
                placeholder._litrt_index,
                placeholder._litrt_name,
                meta,
                placeholder._litrt_shape,
                placeholder.device,
                is_param=hasattr(placeholder, "_is_param"),
                requires_grad=placeholder._litrt_requires_grad,
            )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            shape, dtype, device = tuple(self.shape), self.dtype, self.device
        return f"Placeholder({self._litrt_name!r}, shape={shape}, dtype={dtype}, device='{device}', loaded on use)"

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        """Returns a plain tensor with the values, in memory of its own, beside the budget."""
        if id(self) not in memo:
            copied = self.detach().clone()
            if hasattr(self, "_is_param"):
                copied = torch.nn.Parameter(copied, requires_grad=self._litrt_requires_grad)
            for name, value in vars(self).items():
                if not name.startswith("_litrt_") and name != "_is_param":
                    setattr(copied, name, copy.deepcopy(value, memo))
            memo[id(self)] = copied
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise LitrtError(
            f"cannot pickle {self._litrt_name!r}: litrt serves it from a store, which holds its values already. To "
            "save values, dict(rt.state_dict()) has them; to save the module, the plain one that rt.detach() gives."
        )


@uncompiled("litrt loads a weight here that is not in memory.")
def _intercept(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Answers a call of `func` with placeholders among its arguments."""
    if _only_computes(func) and not (kwargs and ("out" in kwargs or "inplace" in kwargs)):
        result = call_directly(func, args, kwargs)
        return call(func, args, kwargs) if result is NotImplemented else result
    if func == REQUIRES_GRAD_GET and isinstance(args[0], Placeholder):
        return args[0]._litrt_requires_grad
    if func in METADATA or (func is torch.Tensor.__format__ and _dim(args[0])):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if func in VIEWS:
        views = _view(func, args, kwargs)
        if views is not NotImplemented:
            return views
    if func == DATA_SET and _is_same(*args):
        return None
    if func in ADDRESSES and isinstance(args[0], Placeholder):
        raise LitrtError(
            f"cannot give the memory of {args[0]._litrt_name!r}: litrt moves and overwrites it. Use a copy, w.clone(); "
            "to save weights, rt.state_dict(); to export the model, the plain one that rt.detach() gives."
        )
    if func in GRAD_SETTERS and isinstance(args[0], Placeholder):
        return _set_requires_grad(args[0], *args[1:], **kwargs)
    rows = _part_of(func, args, kwargs)
    if rows is not NotImplemented:
        return rows
    _check_writes(func, args, kwargs)
    try:
        return call(func, args, kwargs)
    except BudgetError:
        # All of a table was to be used, and another thread may have changed the budget since.
        rows = _part_of(func, args, kwargs)
        if rows is NotImplemented:
            raise
        return rows


@lru_cache(maxsize=1024)
def _only_computes(func: Callable[..., Any]) -> bool:
    """Says whether `func` is none of those that have a better answer, but for `out=` and `inplace=`."""
    return not (
        func in METADATA
        or func in VIEWS
        or func in GRAD_SETTERS
        or func in ADDRESSES
        or func is torch.Tensor.__format__
        or may_take_rows(func)
        or isinstance(func, torch._ops.OpOverload)
        or may_write(func)
    )


class Unseen(Placeholder):
    """A placeholder that torch's Python code takes for a plain tensor: it is intercepted in `__torch_dispatch__` only.

    For code that looks whether there is anything to intercept, and does not compute.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def _view(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Returns placeholders for the view that `func` makes of its first argument, or NotImplemented where it copies."""
    self = args[0] if args else None
    if not isinstance(self, Placeholder):
        return NotImplemented
    if is_transformed():
        with torch._C._DisableFuncTorch():
            return lazy_view(func, self, args[1:], kwargs, self._litrt_shape, self._litrt_view)
    return lazy_view(func, self, args[1:], kwargs, self._litrt_shape, self._litrt_view)


def _part_of(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Returns what `func` makes of a few rows of a placeholder, or NotImplemented where it needs all of it."""
    if is_transformed():
        return NotImplemented  # rows are numbers that a transform may have made many of
    table = table_of(func, args, kwargs)
    if isinstance(table, Placeholder):
        if func is torch.nn.functional.embedding and (args[3:4] or (kwargs.get("max_norm"),))[0] is not None:
            refuse_write(table, "embedding with max_norm")
        return gather(func, args, kwargs, table)
    product = grouped(func, args, kwargs)
    if product is not None and isinstance(product.matrices, Placeholder):
        made = multiply_groups(product, product.matrices)
        if made is not NotImplemented and asked_for((args, kwargs), besides=Stored):
            return refused(made, f"a grouped product with {product.matrices._litrt_name!r}")
        return made
    return NotImplemented


def _is_same(one: Any, other: Any) -> bool:
    """Says whether two placeholders are of the same view of the same weight."""
    if not (isinstance(one, Placeholder) and isinstance(other, Placeholder)):
        return False
    if (one._litrt_source, one._litrt_index) != (other._litrt_source, other._litrt_index):
        return False
    with torch._C.DisableTorchFunctionSubclass():
        return (one.size(), one.stride(), one.storage_offset()) == (
            other.size(),
            other.stride(),
            other.storage_offset(),
        )


def _set_requires_grad(placeholder: Placeholder, requires_grad: bool = True) -> Placeholder:
    placeholder._litrt_requires_grad = requires_grad
    return placeholder


def _check_writes(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuses a call of `func` that would write to a placeholder."""
    for target in written(func, args, kwargs):
        if isinstance(target, Placeholder):
            refuse_write(target, getattr(func, "__name__", str(func)))


def _dim(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.dim()
