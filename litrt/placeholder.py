"""Weights that are not there: tensors that load their bytes when, and only when, an operator needs them.

A placeholder reports its true shape, dtype and device. Operators are intercepted at `__torch_function__`, above the
point where they choose a kernel, so the kernel that runs is the one that the plain model runs; `__torch_dispatch__`
catches what C++ code calls. View operators give a placeholder of the view. Nothing ever computes with a substitute.

Note on identity. `Placeholder` is served as a parameter (`isinstance(w, nn.Parameter)`) or as a buffer. Where a weight stays
in memory, `torch.utils.swap_tensors` puts a plain tensor in the place of the placeholder object, so that every
reference to it, also one taken in a constructor, becomes a plain tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, Protocol, Self

import torch

from litrt.errors import LitrtError, WeightWriteError
from litrt.pipeline import Binding


class Source(Protocol):
    """Where placeholders get their tensors: the pipeline."""

    def acquire(self, indices: tuple[int, ...]) -> Binding:
        """Returns tensors for segments, pinned until `release`."""
        ...

    def release(self, binding: Binding) -> None:
        """Says that an operator is done with them."""
        ...


class Placeholder(torch.Tensor):
    """A stored tensor, or a view of one, that is loaded on use.

    Args:
        source: Serves segment `index`.
        index: The segment.
        name: The tensor's name, for messages.
        meta: A meta tensor with the geometry of this view of the segment.
        device: The device it reports.
        is_param: Be an `nn.Parameter` to `isinstance`.
    """

    _litrt_source: Source
    _litrt_index: int
    _litrt_name: str
    _litrt_shape: tuple[int, ...]
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
        self._litrt_source = source
        self._litrt_index = index
        self._litrt_name = name
        self._litrt_shape = stored_shape
        if is_param:
            self._is_param = True
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass  # all is done in __new__

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _VIEWS:
            views = _lazy_view(func, args, kwargs)
            if views is not NotImplemented:
                return views
        if func in _GRAD_SETTERS and isinstance(args[0], Placeholder):
            return _set_requires_grad(args[0], *args[1:], **kwargs)
        written = _written(func, args, kwargs)
        if written is not None:
            _refuse_write(written, getattr(func, "__name__", str(func)))
        return _call(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DISPATCH_VIEWS:
            views = _lazy_view(func, args, kwargs)
            if views is not NotImplemented:
                return views
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Placeholder):
                _refuse_write(value, str(func))
        return _call(func, args, kwargs)

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


def view_of(placeholder: Placeholder, real: torch.Tensor) -> torch.Tensor:
    """Returns the part of `real`, the whole stored tensor, that `placeholder` stands for."""
    with torch._C.DisableTorchFunctionSubclass():
        size, stride, offset = placeholder.size(), placeholder.stride(), placeholder.storage_offset()
    if size == real.size() and stride == real.stride() and offset == 0:
        return real
    return real.as_strided(size, stride, offset)


def _call(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Calls `func` with every placeholder among its arguments replaced by its values."""
    found: list[Placeholder] = []
    _collect(args, found)
    _collect(kwargs.values(), found)
    if not found:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    wanted: dict[int, tuple[Source, dict[int, None]]] = {}
    for placeholder in found:
        source = placeholder._litrt_source
        wanted.setdefault(id(source), (source, {}))[1][placeholder._litrt_index] = None
    held: list[tuple[Source, Binding]] = []
    reals: dict[int, torch.Tensor] = {}
    try:
        for source, indices in wanted.values():
            binding = source.acquire(tuple(indices))
            held.append((source, binding))
            by_index = dict(zip(binding.indices, binding.tensors, strict=True))
            for placeholder in found:
                if placeholder._litrt_source is source:
                    reals[id(placeholder)] = view_of(placeholder, by_index[placeholder._litrt_index])
            del by_index
        return func(*_replace(args, reals), **{key: _replace(value, reals) for key, value in kwargs.items()})
    finally:
        reals.clear()
        for source, binding in held:
            source.release(binding)


def _collect(values: Iterable[Any], found: list[Placeholder]) -> None:
    for value in values:
        if isinstance(value, Placeholder):
            found.append(value)
        elif isinstance(value, list | tuple):
            _collect(value, found)
        elif isinstance(value, dict):
            _collect(value.values(), found)


def _replace(value: Any, reals: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, Placeholder):
        return reals[id(value)]
    if isinstance(value, tuple):
        items = [_replace(item, reals) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [_replace(item, reals) for item in value]
    if isinstance(value, dict):
        return {key: _replace(item, reals) for key, item in value.items()}
    return value


def _lazy_view(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Returns placeholders for the view that `func` makes of its first argument, or NotImplemented where it copies."""
    self = args[0] if args else None
    if not isinstance(self, Placeholder) or _has_tensor((*args[1:], *kwargs.values())):
        return NotImplemented
    if func in _CONVERSIONS:
        return self if _converts_nothing(self, func, args[1:], kwargs) else NotImplemented
    with torch._C.DisableTorchFunctionSubclass(), torch.inference_mode(False), torch.no_grad():
        base = torch.empty(self._litrt_shape, dtype=self.dtype, device="meta")
        twin = base.as_strided(self.size(), self.stride(), self.storage_offset())
        try:
            made = func(twin, *args[1:], **kwargs)
        except Exception:
            return NotImplemented  # the call on the values says what is wrong, in torch's words
        storage = base.untyped_storage()._cdata

        def wrap(view: Any) -> Any:
            if isinstance(view, list | tuple):
                wrapped = [wrap(item) for item in view]
                return NotImplemented if any(item is NotImplemented for item in wrapped) else type(view)(wrapped)
            if not isinstance(view, torch.Tensor) or view.dtype != self.dtype:
                return NotImplemented
            if view.untyped_storage()._cdata != storage or view.is_conj() or view.is_neg():
                return NotImplemented
            return Placeholder(
                self._litrt_source, self._litrt_index, self._litrt_name, view, self._litrt_shape, self.device
            )

        return wrap(made)


def _has_tensor(values: Iterable[Any]) -> bool:
    for value in values:
        if isinstance(value, torch.Tensor):
            return True
        if isinstance(value, list | tuple) and _has_tensor(value):
            return True
    return False


def _converts_nothing(
    self: Placeholder, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> bool:
    """Says whether `w.to(...)` and its like ask for the dtype and device that `w` has."""
    with torch._C.DisableTorchFunctionSubclass():
        if func in _CASTS:
            return self.dtype == _CASTS[func] and not args and not kwargs
        if func is torch.Tensor.cpu:
            return self.device.type == "cpu"
        if kwargs.get("copy"):
            return False
        try:
            device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        except (TypeError, RuntimeError):
            return False
        same_device = device is None or (
            device.type == self.device.type and device.index in (None, self.device.index)
        )
        return same_device and dtype in (None, self.dtype) and memory_format in (None, torch.preserve_format)


def _written(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Placeholder | None:
    """Returns the placeholder that `func` would write to, if any."""
    out = kwargs.get("out")
    for target in out if isinstance(out, list | tuple) else (out,):
        if isinstance(target, Placeholder):
            return target
    if not args or not isinstance(args[0], Placeholder):
        return None
    name = getattr(func, "__name__", "")
    if func in _WRITERS or (name.endswith("_") and not name.endswith("__")):
        return args[0]
    return None


def _set_requires_grad(placeholder: Placeholder, requires_grad: bool = True) -> Placeholder:
    if requires_grad:
        raise WeightWriteError(
            f"cannot train {placeholder._litrt_name!r}: litrt serves weights read-only, for inference.",
            name=placeholder._litrt_name,
        )
    return placeholder


def _refuse_write(placeholder: Placeholder, func_name: str) -> NoReturn:
    raise WeightWriteError(
        f"cannot write to {placeholder._litrt_name!r} ({func_name}): litrt serves weights read-only. Change the "
        "checkpoint and convert it again, or use a copy: w = w.clone().",
        name=placeholder._litrt_name,
    )


def _methods(*names: str) -> frozenset[Callable[..., Any]]:
    """Returns the functions of those names, as methods of Tensor, getters of its properties and in `torch`."""
    found = []
    for name in names:
        for owner in (torch.Tensor, torch, torch._C.TensorBase):
            attribute = getattr(owner, name, None)
            if attribute is None:
                continue
            found.append(attribute.__get__ if type(attribute).__name__ in ("getset_descriptor", "property") else attribute)
    return frozenset(found)


_METADATA = _methods(
    "shape", "dtype", "device", "layout", "ndim", "names", "itemsize", "nbytes", "grad", "grad_fn", "requires_grad",
    "is_leaf", "is_cpu", "is_cuda", "is_meta", "is_sparse", "is_sparse_csr", "is_mkldnn", "is_quantized", "is_nested",
    "is_xpu", "is_mps", "is_xla", "is_ipu", "is_mtia", "is_maia", "is_vulkan", "output_nr", "retains_grad", "name",
    "volatile", "_version", "_base", "_backward_hooks", "_post_accumulate_grad_hooks", "size", "stride", "dim",
    "numel", "nelement", "ndimension", "element_size", "storage_offset", "is_contiguous", "is_floating_point",
    "is_complex", "is_signed", "is_inference", "is_pinned", "is_shared", "is_conj", "is_neg", "has_names", "get_device",
    "__len__", "__hash__", "__dir__", "_is_view", "is_same_size", "is_set_to", "_is_zerotensor", "_has_symbolic_sizes_strides",
    "dim_order", "is_distributed", "result_type", "can_cast", "promote_types", "numel",
)  # fmt: skip
"""What a placeholder answers without its bytes."""

_VIEWS = _methods(
    "t", "transpose", "permute", "view", "view_as", "reshape", "reshape_as", "unsqueeze", "squeeze", "narrow", "select",
    "expand", "expand_as", "broadcast_to", "chunk", "split", "split_with_sizes", "tensor_split", "hsplit", "vsplit", "dsplit",
    "unbind", "flatten", "unflatten", "movedim", "moveaxis", "swapaxes", "swapdims", "diagonal", "detach", "contiguous",
    "alias", "as_strided", "unfold", "adjoint", "ravel", "__getitem__", "T", "mT", "H", "mH", "data", "to", "cpu", "float",
    "double", "half", "bfloat16", "atleast_1d", "atleast_2d", "atleast_3d",
)  # fmt: skip
"""What may be answered by a placeholder of the view, where it is one."""

_CASTS = {
    torch.Tensor.float: torch.float32,
    torch.Tensor.double: torch.float64,
    torch.Tensor.half: torch.float16,
    torch.Tensor.bfloat16: torch.bfloat16,
}
_CONVERSIONS = frozenset({torch.Tensor.to, torch.Tensor.cpu, *_CASTS})

_WRITERS = frozenset(
    {
        torch.Tensor.data.__set__,  # type: ignore[attr-defined]
        torch.Tensor.__setitem__,
        *(
            getattr(torch.Tensor, f"__i{name}__")
            for name in "add sub mul truediv floordiv mod pow and or xor lshift rshift".split()
            if hasattr(torch.Tensor, f"__i{name}__")
        ),
    }
)

_GRAD_SETTERS = frozenset({torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__})  # type: ignore[attr-defined]

_aten = torch.ops.aten
_DISPATCH_VIEWS = frozenset(
    {
        _aten.detach.default,
        _aten.alias.default,
        _aten.view.default,
        _aten.t.default,
        _aten.transpose.int,
        _aten.permute.default,
        _aten.unsqueeze.default,
        _aten.select.int,
        _aten.slice.Tensor,
        _aten.expand.default,
        _aten.as_strided.default,
    }
)
