"""Weights that are not there: tensors that load their bytes when, and only when, an operator needs them.

A placeholder reports its true shape, dtype and device. Operators are intercepted at `__torch_function__`, above the
point where they choose a kernel, so the kernel that runs is the one that the plain model runs; `__torch_dispatch__`
catches what C++ code calls. View operators give a placeholder of the view. Nothing ever computes with a substitute.

Note on identity. A placeholder is served as a parameter (`isinstance(w, nn.Parameter)`) or as a buffer. Where a weight
stays in memory, `torch.utils.swap_tensors` puts a plain tensor in the place of the placeholder object, so that every
reference to it, also one taken in a constructor, becomes a plain tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn, Self

import torch

from litrt.bindings import Binding
from litrt.errors import LitrtError, WeightWriteError
from litrt.operators import DISPATCH_VIEWS, GRAD_SETTERS, METADATA, REQUIRES_GRAD_GET, VIEWS, written
from litrt.rowops import grouped, table_of
from litrt.rows import Source, gather, multiply_groups
from litrt.views import lazy_view


class Placeholder(torch.Tensor):
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

    _litrt_source: Source
    _litrt_index: int
    _litrt_name: str
    _litrt_shape: tuple[int, ...]
    _litrt_requires_grad: bool
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
        if is_param:
            self._is_param = True
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass  # all is done in __new__

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        return _intercept(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in DISPATCH_VIEWS:
            views = _view(func, args, kwargs)
            if views is not NotImplemented:
                return views
        rows = _part_of(func, args, kwargs)
        if rows is not NotImplemented:
            return rows
        _check_writes(func, args, kwargs)
        return _call(func, args, kwargs)

    @property
    def _litrt_is_whole(self) -> bool:
        with torch._C.DisableTorchFunctionSubclass():
            return self.size() == self._litrt_shape and self.is_contiguous() and self.storage_offset() == 0

    @property
    def _litrt_dtype(self) -> torch.dtype:
        with torch._C.DisableTorchFunctionSubclass():
            return self.dtype

    def _litrt_view(self, geometry: torch.Tensor) -> Placeholder:
        """Returns a placeholder for the view of the same segment that `geometry` is."""
        with torch._C.DisableTorchFunctionSubclass():
            device = self.device
        return Placeholder(self._litrt_source, self._litrt_index, self._litrt_name, geometry, self._litrt_shape, device)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            shape, dtype, device = tuple(self.shape), self.dtype, self.device
        return f"Placeholder({self._litrt_name!r}, shape={shape}, dtype={dtype}, device='{device}', loaded on use)"

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise LitrtError(
            f"cannot copy {self._litrt_name!r}: litrt serves it from a store. Make another litrt.Runtime on the store."
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise LitrtError(
            f"cannot pickle {self._litrt_name!r}: litrt serves it from a store, which holds its values already."
        )


@torch._disable_dynamo  # type: ignore[attr-defined]  # a compiled block breaks here, and goes on behind
def _intercept(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Answers a call of `func` with placeholders among its arguments."""
    if func == REQUIRES_GRAD_GET and isinstance(args[0], Placeholder):
        return args[0]._litrt_requires_grad
    if func in METADATA or (func is torch.Tensor.__format__ and _dim(args[0])):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if func in VIEWS:
        views = _view(func, args, kwargs)
        if views is not NotImplemented:
            return views
    if func in GRAD_SETTERS and isinstance(args[0], Placeholder):
        return _set_requires_grad(args[0], *args[1:], **kwargs)
    rows = _part_of(func, args, kwargs)
    if rows is not NotImplemented:
        return rows
    _check_writes(func, args, kwargs)
    return _call(func, args, kwargs)


class Unseen(Placeholder):
    """A placeholder that torch's Python code takes for a plain tensor: it is intercepted in `__torch_dispatch__` only.

    For code that looks whether there is anything to intercept, and does not compute.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

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


def _view_of(placeholder: Placeholder, real: torch.Tensor) -> torch.Tensor:
    """Returns the part of `real`, the whole stored tensor, that `placeholder` stands for."""
    with torch._C.DisableTorchFunctionSubclass():
        size, stride, offset = placeholder.size(), placeholder.stride(), placeholder.storage_offset()
    if size != real.size() or stride != real.stride() or offset != 0:
        return real.as_strided(size, stride, offset)
    if not placeholder._litrt_requires_grad:
        return real
    # Products fold a batch into one matrix, or do not, by what their second factor says here.
    return real.detach().requires_grad_()


class Borrowed:
    """The values of placeholders, pinned in memory until `give_back`."""

    def __init__(self) -> None:
        self._values: dict[int, torch.Tensor] = {}
        # By the address of their storage, with the element of the weight that it begins with.
        self._owners: dict[int, tuple[Placeholder, int]] = {}
        self._held: list[tuple[Source, Binding]] = []
        self._versions: list[int] = []  # of the values, as they were borrowed

    def borrow(self, find: Callable[[], Iterable[Placeholder]]) -> None:
        """Loads the values of all placeholders that `find` finds.

        It is asked again until there are no new ones: making room for some can turn weights that stayed in memory
        back into placeholders.
        """
        while found := [placeholder for placeholder in find() if id(placeholder) not in self._values]:
            wanted: dict[int, tuple[Source, dict[int, None]]] = {}
            for placeholder in found:
                if not placeholder._litrt_is_whole:
                    continue
                source = placeholder._litrt_source
                wanted.setdefault(id(source), (source, {}))[1][placeholder._litrt_index] = None
            for placeholder in found:
                source, index = placeholder._litrt_source, placeholder._litrt_index
                indices = wanted.setdefault(id(source), (source, {}))[1]
                if index not in indices and not self._borrow_part(placeholder):
                    indices[index] = None
            for source, indices in wanted.values():
                if not indices:
                    continue
                binding = source.acquire(tuple(indices))
                self._held.append((source, binding))
                by_index = dict(zip(binding.indices, binding.tensors, strict=True))
                for placeholder in found:
                    if placeholder._litrt_source is source and id(placeholder) not in self._values:
                        value = _view_of(placeholder, by_index[placeholder._litrt_index])
                        self._keep(placeholder, value)
        self._versions = [value._version for value in self._values.values()]

    def _borrow_part(self, placeholder: Placeholder) -> bool:
        """Loads what a view needs of its weight, where that is not all; says whether it did."""
        source = placeholder._litrt_source
        with torch._C.DisableTorchFunctionSubclass():
            size, stride, first = placeholder.size(), placeholder.stride(), placeholder.storage_offset()
        if 0 in size:
            return False
        last = first + sum((extent - 1) * step for extent, step in zip(size, stride, strict=True))
        binding = source.acquire_rows(placeholder._litrt_index, [(int(first), int(last) + 1)])
        if binding is None:
            return False
        self._held.append((source, binding))
        start = binding.ranges[0][0]
        self._keep(placeholder, binding.tensors[0].as_strided(size, stride, first - start), start)
        return True

    def _keep(self, placeholder: Placeholder, value: torch.Tensor, start: int = 0) -> None:
        self._values[id(placeholder)] = value
        self._owners[value.untyped_storage()._cdata] = placeholder, start

    def check_unwritten(self, func: Callable[..., Any]) -> None:
        """Raises WeightWriteError where `func` has written to what was borrowed, and reads that again.

        For functions that write and do not say so. Inference mode counts no writes: there this notices nothing.
        """
        if self._versions != [value._version for value in self._values.values()]:
            for source, binding in self._held:
                source.restore(binding)
            owner, _ = next(iter(self._owners.values()))
            _refuse_write(owner, getattr(func, "__name__", str(func)))

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, placeholder: Placeholder) -> torch.Tensor:
        return self._values[id(placeholder)]

    def without_aliases(self, result: Any) -> Any:
        """Returns the result of an operator, with placeholders for tensors in it that are views of what was borrowed.

        So that a view does not keep a weight in memory, and a write through it is refused.
        """
        if isinstance(result, torch.Tensor):
            if isinstance(result, Placeholder) or result.layout is not torch.strided:
                return result
            owner, start = self._owners.get(result.untyped_storage()._cdata, (None, 0))
            if owner is None or result.dtype != owner._litrt_dtype or result.is_conj() or result.is_neg():
                return result
            with torch.inference_mode(False), torch.no_grad():
                stored = torch.empty(owner._litrt_shape, dtype=result.dtype, device="meta")
                place = result.storage_offset() + start
                return owner._litrt_view(stored.as_strided(result.size(), result.stride(), place))
        if type(result) in (list, tuple):
            return type(result)(self.without_aliases(item) for item in result)
        return result

    def give_back(self) -> None:
        """Lets the values go; those that somebody made an alias of stay until it dies."""
        self._owners.clear()
        self._values.clear()
        while self._held:
            source, binding = self._held.pop()
            source.release(binding)


def _call(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Calls `func` with every placeholder among its arguments replaced by its values."""
    borrowed = Borrowed()
    real_args: Any = None
    real_kwargs: Any = None
    try:
        borrowed.borrow(lambda: _placeholders((*args, *kwargs.values())))
        if not borrowed:  # placeholders in a container that we do not look into: met again further down
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        real_args, real_kwargs = _replace(args, borrowed), _replace(kwargs, borrowed)
        with torch.no_grad(), _no_autocast_cache() if torch._C._is_any_autocast_enabled() else nullcontext():
            result = func(*real_args, **real_kwargs)
        borrowed.check_unwritten(func)
        return borrowed.without_aliases(result)
    finally:
        real_args = real_kwargs = None
        borrowed.give_back()


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Keeps autocast from remembering the weights that it casts: until it ends, it would hold all of them."""
    was_enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was_enabled)


def _placeholders(values: Iterable[Any]) -> list[Placeholder]:
    """Returns the placeholders among `values`, and in the lists, tuples and dicts among them."""
    found: list[Placeholder] = []
    for value in values:
        if isinstance(value, Placeholder):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _placeholders(value)
        elif isinstance(value, dict):
            found += _placeholders(value.values())
    return found


def _replace(value: Any, reals: Borrowed) -> Any:
    if isinstance(value, Placeholder):
        return reals[value]
    if isinstance(value, tuple):
        items = [_replace(item, reals) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [_replace(item, reals) for item in value]
    if isinstance(value, dict):
        return {key: _replace(item, reals) for key, item in value.items()}
    return value


def _view(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Returns placeholders for the view that `func` makes of its first argument, or NotImplemented where it copies."""
    self = args[0] if args else None
    if not isinstance(self, Placeholder):
        return NotImplemented
    return lazy_view(func, self, args[1:], kwargs, self._litrt_shape, self._litrt_view)


def _part_of(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Returns what `func` makes of a few rows of a placeholder, or NotImplemented where it needs all of it."""
    table = table_of(func, args, kwargs)
    if isinstance(table, Placeholder):
        if func is torch.nn.functional.embedding and (args[3:4] or (kwargs.get("max_norm"),))[0] is not None:
            _refuse_write(table, "embedding with max_norm")
        return gather(func, args, kwargs, table)
    product = grouped(func, args, kwargs)
    if product is not None and isinstance(product.matrices, Placeholder):
        return multiply_groups(product, product.matrices)
    return NotImplemented


def _set_requires_grad(placeholder: Placeholder, requires_grad: bool = True) -> Placeholder:
    placeholder._litrt_requires_grad = requires_grad
    return placeholder


def _check_writes(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuses a call of `func` that would write to a placeholder."""
    for target in written(func, args, kwargs):
        if isinstance(target, Placeholder):
            _refuse_write(target, getattr(func, "__name__", str(func)))


def _dim(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.dim()


def _refuse_write(placeholder: Placeholder, func_name: str) -> NoReturn:
    raise WeightWriteError(
        f"cannot write to {placeholder._litrt_name!r} ({func_name}): litrt serves weights read-only. Change the "
        "checkpoint and convert it again, or use a copy: w = w.clone().",
        name=placeholder._litrt_name,
    )
