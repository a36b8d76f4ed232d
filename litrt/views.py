"""Views of tensors whose bytes are not there: what torch's view operators would make of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from litrt.operators import CASTS, CONVERSIONS, INTEGERS


def lazy_view(
    func: Callable[..., Any],
    self: torch.Tensor,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    stored_shape: tuple[int, ...],
    make: Callable[[torch.Tensor], torch.Tensor],
) -> Any:
    """Returns the view that `func` makes of its first argument, or NotImplemented where it copies.

    Args:
        func: A view operator.
        self: Its first argument, of which nothing but the geometry is looked at.
        args: Its other arguments.
        kwargs: Likewise.
        stored_shape: The shape of the contiguous tensor that `self` is a view of.
        make: Makes a view from a meta tensor with its geometry.
    """
    if func is torch.Tensor.__getitem__:
        args = (_plain_index(args[0]),)
    if _has_tensor((*args, *kwargs.values())):
        return NotImplemented
    if func in CONVERSIONS:
        return self if converts_nothing(self, func, args, kwargs) else NotImplemented
    with torch._C.DisableTorchFunctionSubclass(), torch.inference_mode(False), torch.no_grad():
        base = torch.empty(stored_shape, dtype=self.dtype, device="meta")
        twin = base.as_strided(self.size(), self.stride(), self.storage_offset())
        try:
            made = func(twin, *args, **kwargs)
        except Exception:
            return NotImplemented  # the call on the values says what is wrong, in torch's words
        storage = base.untyped_storage()._cdata

        def wrap(view: Any) -> Any:
            if isinstance(view, list | tuple):
                wrapped = [wrap(item) for item in view]
                return NotImplemented if any(item is NotImplemented for item in wrapped) else type(view)(wrapped)
            if view is twin:
                return self
            if not isinstance(view, torch.Tensor) or view.dtype != self.dtype:
                return NotImplemented
            if view.untyped_storage()._cdata != storage or view.is_conj() or view.is_neg():
                return NotImplemented
            return make(view)

        return wrap(made)


def _plain_index(index: Any) -> Any:
    """Returns `index` with integers in tensors of no dimension as ints: both select, and give a view."""
    if isinstance(index, tuple):
        return tuple(_plain_index(item) for item in index)
    if type(index) is torch.Tensor and index.dim() == 0 and index.dtype in INTEGERS and not index.is_meta:
        return index if torch._C._functorch.is_functorch_wrapped_tensor(index) else int(index)
    return index


def _has_tensor(values: Iterable[Any]) -> bool:
    for value in values:
        if isinstance(value, torch.Tensor):
            return True
        if isinstance(value, list | tuple) and _has_tensor(value):
            return True
    return False


def asked_for(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[torch.device | None, torch.dtype | None, torch.memory_format | None] | None:
    """Returns what `w.to(...)` and its like ask for, `func` called with `w` and these; None where that is not known.

    Args:
        func: One of `CONVERSIONS`.
        args: Its other arguments.
        kwargs: Likewise.
    """
    if func in CASTS:
        return None if args or kwargs else (None, CASTS[func], None)
    if func is torch.Tensor.cpu:
        return torch.device("cpu"), None, None
    if func is torch.Tensor.cuda:
        device = args[0] if args else kwargs.get("device")
        return torch.device("cuda" if device is None else device), None, None
    if func is torch.Tensor.type:
        is_dtype = len(args) == 1 and isinstance(args[0], torch.dtype)
        return (None, args[0], None) if is_dtype else None
    if kwargs.get("copy"):
        return None
    try:
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    except (TypeError, RuntimeError):
        return None
    return device, dtype, None if memory_format is torch.preserve_format else memory_format


def converts_nothing(
    self: torch.Tensor, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool:
    """Says whether `w.to(...)` and its like ask for the dtype and device that `w` has."""
    asked = asked_for(func, args, kwargs)
    if asked is None:
        return False
    device, dtype, memory_format = asked
    with torch._C.DisableTorchFunctionSubclass():
        same_device = device is None or (device.type == self.device.type and device.index in (None, self.device.index))
        return same_device and dtype in (None, self.dtype) and memory_format is None
