"""The values of weights for the time of a call: loaded, put in the place of what stands for them, and given back."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn, Self

import torch
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

from litrt import gradients
from litrt.bindings import Binding
from litrt.errors import BudgetError, WeightWriteError
from litrt.rows import Source


class Stored(torch.Tensor):
    """A tensor that stands for a stored one, or for a view of one, and has no values."""

    _litrt_source: Source
    _litrt_index: int
    _litrt_name: str
    _litrt_shape: tuple[int, ...]
    _litrt_requires_grad: bool
    _litrt_is_whole: bool  # of all elements, in order
    _litrt_is_plain: bool  # and with the strides that the values have when they are loaded

    @property
    def _litrt_dtype(self) -> torch.dtype:
        with torch._C.DisableTorchFunctionSubclass():
            return self.dtype

    def _litrt_view(self, geometry: torch.Tensor) -> Self:
        """Returns one for the view of the same segment that `geometry` is."""
        raise NotImplementedError


def _view_of(placeholder: Stored, real: torch.Tensor) -> torch.Tensor:
    """Returns the part of `real`, the whole stored tensor, that `placeholder` stands for."""
    with torch._C.DisableTorchFunctionSubclass():
        size, stride, offset = placeholder.size(), placeholder.stride(), placeholder.storage_offset()
    if size != real.size() or stride != real.stride() or offset != 0:
        return real.as_strided(size, stride, offset)
    if not placeholder._litrt_requires_grad:
        return real
    # Products fold a batch into one matrix, or do not, by what their second factor says here. Transforms of torch.func
    # forbid `requires_grad_`.
    return torch.Tensor._make_subclass(torch.Tensor, real, True)


def was_swapped(error: AttributeError) -> bool:
    """Says whether another thread has put a plain tensor in the place of a placeholder that this one looked at.

    That happens before the weight is borrowed, so that nothing was computed yet.
    """
    return str(error.name).startswith("_litrt_") and type(error.obj) in (torch.Tensor, torch.nn.Parameter)


class Borrowed:
    """The values of placeholders, pinned in memory until `give_back`."""

    def __init__(self) -> None:
        self._values: dict[int, torch.Tensor] = {}
        # By the address of their storage, with the element of the weight that it begins with.
        self._owners: dict[int, tuple[Stored, int]] = {}
        self._held: list[tuple[Source, Binding]] = []
        self._versions: list[int] = []  # of the values, as they were borrowed

    def borrow(self, find: Callable[[], Iterable[Stored]]) -> None:
        """Loads the values of all placeholders that `find` finds.

        It is asked again until there are no new ones: making room for some can turn weights that stayed in memory
        back into placeholders.
        """
        while found := [placeholder for placeholder in find() if id(placeholder) not in self._values]:
            try:
                self._borrow(found)
            except AttributeError as error:
                if not was_swapped(error):
                    raise
        self._versions = [value._version for value in self._values.values()]

    def _borrow(self, found: Sequence[Stored]) -> None:
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

    def take(
        self,
        source: Source,
        binding: Binding,
        values: Iterable[tuple[Stored, torch.Tensor]],
        versions: Sequence[int],
    ) -> None:
        """Takes over values that were acquired, with their versions from before they were used."""
        self._held.append((source, binding))
        for placeholder, value in values:
            self._keep(placeholder, value)
        self._versions = list(versions)

    def _borrow_part(self, placeholder: Stored) -> bool:
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

    def _keep(self, placeholder: Stored, value: torch.Tensor, start: int = 0) -> None:
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
            refuse_write(owner, getattr(func, "__name__", str(func)))

    def what(self, func: Callable[..., Any]) -> str:
        """Returns words for a use of what was borrowed."""
        owner, _ = next(iter(self._owners.values()))
        return f"{getattr(func, '__name__', func)!s} with {owner._litrt_name!r}"

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, placeholder: Stored) -> torch.Tensor:
        return self._values[id(placeholder)]

    def without_aliases(self, result: Any) -> Any:
        """Returns the result of an operator, with placeholders for tensors in it that are views of what was borrowed.

        So that a view does not keep a weight in memory, and a write through it is refused.
        """
        if isinstance(result, torch.Tensor):
            if isinstance(result, Stored) or result.layout is not torch.strided:
                return result
            if is_functorch_wrapped_tensor(result):
                return result.clone() if _unwrapped(result).untyped_storage()._cdata in self._owners else result
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


def call(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Calls `func` with every placeholder among its arguments replaced by its values.

    Transforms of `torch.func` see these as constants: they are loaded outside of them.
    """
    borrowed = Borrowed()
    is_transformed = gradients.is_transformed()
    real_args: Any = None
    real_kwargs: Any = None
    try:
        with torch._C._DisableFuncTorch() if is_transformed else nullcontext():
            _borrow_all(borrowed, args, kwargs)
        if not borrowed:  # placeholders in a container that we do not look into: met again further down
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        real_args, real_kwargs = _replace(args, borrowed), _replace(kwargs, borrowed)
        if is_transformed:
            gradients.check_transforms(borrowed.what(func))
        with torch.no_grad(), no_autocast_cache():
            result = func(*real_args, **real_kwargs)
        borrowed.check_unwritten(func)
        result = borrowed.without_aliases(result)
        if gradients.asked_for((args, kwargs), besides=Stored):
            return gradients.refused(result, borrowed.what(func))
        return result
    except BaseException as error:
        let_go_of_values(error)
        raise
    finally:
        real_args = real_kwargs = None
        borrowed.give_back()


def _borrow_all(borrowed: Borrowed, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    try:
        borrowed.borrow(lambda: _placeholders((*args, *kwargs.values())))
    except BudgetError as error:
        if torch._C._get_tracing_state() is None:
            raise
        raise BudgetError(
            "torch.jit.trace keeps every weight that it has seen, and the budget does not hold them all: trace the "
            f"plain module that rt.detach() gives. ({error})",
            budget_bytes=error.budget_bytes,
            needed_bytes=error.needed_bytes,
        ) from error


def call_directly(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Does what `call` does, in less time, in the usual case; in any other returns NotImplemented and calls nothing.

    The usual case: whole weights of one runtime, each an argument itself and there once, no gradients, no autocast.
    """
    if torch.is_grad_enabled() or torch._C._is_any_autocast_enabled() or gradients.is_transformed():
        return NotImplemented
    weights: list[Stored] = []
    indices: list[int] = []
    given = (*args, *kwargs.values()) if kwargs else args
    for arg in given:
        if isinstance(arg, Stored):
            if not arg._litrt_is_plain or arg._litrt_index in indices:
                return NotImplemented
            if weights and arg._litrt_source is not weights[0]._litrt_source:
                return NotImplemented
            weights.append(arg)
            indices.append(arg._litrt_index)
        elif isinstance(arg, list | tuple):
            for item in arg:
                if not isinstance(item, int):
                    return NotImplemented
        elif isinstance(arg, dict):
            return NotImplemented
    if not weights:
        return NotImplemented
    source = weights[0]._litrt_source
    binding = source.acquire(tuple(indices))
    borrowed: Borrowed | None = None
    loaded: torch.Tensor | None
    values: list[torch.Tensor] = []
    real_args: list[Any] = []
    try:
        for arg in given:
            if isinstance(arg, Stored):
                number = len(values)
                if number == len(weights) or arg is not weights[number]:
                    return NotImplemented  # to make room, a weight that stayed has just become a placeholder
                loaded = binding.tensors[number]
                values.append(loaded.detach().requires_grad_() if arg._litrt_requires_grad else loaded)
                real_args.append(values[number])
            else:
                real_args.append(arg)
        if len(values) < len(weights):
            return NotImplemented  # another thread has made one plain
        versions = [value._version for value in values]
        if kwargs:
            result = func(*real_args[: len(args)], **dict(zip(kwargs, real_args[len(args) :], strict=True)))
        else:
            result = func(*real_args)
        if versions == [value._version for value in values] and _is_apart(result, values):
            return result
        borrowed = Borrowed()
        borrowed.take(source, binding, zip(weights, values, strict=True), versions)
        borrowed.check_unwritten(func)
        return borrowed.without_aliases(result)
    except BaseException as error:
        let_go_of_values(error)
        raise
    finally:
        loaded = None
        values.clear()
        real_args.clear()
        if borrowed is None:
            source.release(binding)
        else:
            borrowed.give_back()


def let_go_of_values(error: BaseException) -> None:
    """Empties the frames of torch's functions that an operator has left with `error`.

    Whoever keeps the error, to log it or to look at it, would keep what they had as arguments in the arena.
    """
    traceback.clear_frames(error.__traceback__)


def _unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor inside one of a transform of `torch.func`."""
    while is_functorch_wrapped_tensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def _is_apart(result: Any, values: Iterable[torch.Tensor]) -> bool:
    """Says whether a result is a plain tensor that shares no memory with `values`."""
    if type(result) is not torch.Tensor or result.layout is not torch.strided:
        return False
    storage = result.untyped_storage()._cdata
    return storage not in [value.untyped_storage()._cdata for value in values]


@contextmanager
def no_autocast_cache() -> Iterator[None]:
    """Keeps autocast from remembering the weights that it casts: until it ends, it would hold all of them."""
    if not torch._C._is_any_autocast_enabled():
        yield
        return
    was_enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was_enabled)


def _placeholders(values: Iterable[Any]) -> list[Stored]:
    """Returns the placeholders among `values`, and in the lists, tuples and dicts among them."""
    found: list[Stored] = []
    for value in values:
        if isinstance(value, Stored):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _placeholders(value)
        elif isinstance(value, dict):
            found += _placeholders(value.values())
    return found


def _replace(value: Any, reals: Borrowed) -> Any:
    if isinstance(value, Stored):
        return reals[value]
    if isinstance(value, tuple):
        items = [_replace(item, reals) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [_replace(item, reals) for item in value]
    if isinstance(value, dict):
        return {key: _replace(item, reals) for key, item in value.items()}
    return value


def refuse_write(placeholder: Stored, func_name: str) -> NoReturn:
    raise WeightWriteError(
        f"cannot write to {placeholder._litrt_name!r} ({func_name}): litrt serves weights read-only. Change the "
        "checkpoint and convert it again, or use a copy: w = w.clone().",
        name=placeholder._litrt_name,
    )
