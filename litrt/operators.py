"""What torch's functions do with their arguments: answer without their values, make views of them, write to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F


def written(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """Yields the arguments that `func` says it writes to: by its schema, its name, or `out=` and `inplace=`.

    A Python function that writes and does not say so is not found.
    """
    if isinstance(func, torch._ops.OpOverload):
        yield from written_by_schema(func, args, kwargs)
        yield from _statistics(func, args, kwargs)
        return
    yield from _flat(kwargs.get("out"))
    if kwargs.get("inplace") is True or _writes_by_name(func):
        yield from _flat(args[0] if args else next(iter(kwargs.values()), None))
    yield from _statistics(func, args, kwargs)


def may_write(func: Callable[..., Any]) -> bool:
    """Says whether `func` writes to arguments in some calls, beside `out=` and `inplace=`."""
    return _writes_by_name(func) or func in _STATISTICS


def _writes_by_name(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return func in _WRITERS or (name.endswith("_") and not name.endswith("__"))


def _statistics(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """Yields the running statistics that a normalization updates: neither schemas nor versions tell that it does."""
    names = _STATISTICS.get(func)
    if names is None:
        return
    given = {"use_input_stats": True, **dict(zip(names.split(), args, strict=False)), **kwargs}
    if given.get("training" if "training" in names else "use_input_stats"):
        yield given.get("running_mean")
        yield given.get("running_var")


def written_by_schema(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """Yields the arguments that an operator of the dispatcher writes to."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _flat(args[position] if position < len(args) else kwargs.get(argument.name))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        yield from value
    else:
        yield value


def _methods(*names: str) -> frozenset[Callable[..., Any]]:
    """Returns the functions of those names, as methods of Tensor, getters of its properties and in `torch`."""
    found = []
    for name in names:
        for owner in (torch.Tensor, torch, torch._C.TensorBase):
            attribute = getattr(owner, name, None)
            if attribute is None:
                continue
            found.append(
                attribute.__get__ if type(attribute).__name__ in ("getset_descriptor", "property") else attribute
            )
    return frozenset(found)


METADATA = _methods(
    *"""
    shape dtype device layout ndim names itemsize nbytes grad grad_fn requires_grad is_leaf is_cpu is_cuda is_meta
    is_sparse is_sparse_csr is_mkldnn is_quantized is_nested is_xpu is_mps is_xla is_ipu is_mtia is_maia is_vulkan
    output_nr retains_grad name volatile _version _base _backward_hooks _post_accumulate_grad_hooks size stride dim
    numel nelement ndimension element_size storage_offset is_contiguous is_floating_point is_complex is_signed
    is_inference is_pinned is_shared is_conj is_neg has_names get_device __len__ __hash__ __dir__ _is_view is_same_size
    is_set_to _is_zerotensor _has_symbolic_sizes_strides dim_order is_distributed result_type can_cast promote_types
    """.split()
)
"""What a placeholder answers without its bytes."""

ADDRESSES = _methods(*"data_ptr untyped_storage storage _typed_storage __cuda_array_interface__".split())
"""What tells where a tensor is in memory. What is there is not known to be used, and may be gone the moment after."""

VIEWS = _methods(
    *"""
    t transpose permute view view_as reshape reshape_as unsqueeze squeeze narrow select expand expand_as broadcast_to
    chunk split split_with_sizes tensor_split hsplit vsplit dsplit unbind flatten unflatten movedim moveaxis swapaxes
    swapdims diagonal detach contiguous alias as_strided unfold adjoint ravel __getitem__ T mT H mH data to type cpu
    cuda float double half bfloat16 atleast_1d atleast_2d atleast_3d
    """.split()
)
"""What may be answered by a placeholder of the view, where it is one."""

INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8})

CASTS = {
    torch.Tensor.float: torch.float32,
    torch.Tensor.double: torch.float64,
    torch.Tensor.half: torch.float16,
    torch.Tensor.bfloat16: torch.bfloat16,
}
CONVERSIONS = frozenset({torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda, torch.Tensor.type, *CASTS})

DATA_SET: Any = torch.Tensor.data.__set__  # type: ignore[attr-defined]

_WRITERS = frozenset(
    {
        DATA_SET,
        torch.Tensor.__setitem__,
        *(
            getattr(torch.Tensor, f"__i{name}__")
            for name in [
                "add",
                "sub",
                "mul",
                "truediv",
                "floordiv",
                "mod",
                "pow",
                "and",
                "or",
                "xor",
                "lshift",
                "rshift",
            ]
            if hasattr(torch.Tensor, f"__i{name}__")
        ),
    }
)

REQUIRES_GRAD: Any = torch.Tensor.requires_grad
REQUIRES_GRAD_GET = REQUIRES_GRAD.__get__
GRAD_SETTERS = frozenset({torch.Tensor.requires_grad_, REQUIRES_GRAD.__set__})

_aten = torch.ops.aten
_STATISTICS: dict[Callable[..., Any], str] = {
    F.batch_norm: "input running_mean running_var weight bias training",
    F.instance_norm: "input running_mean running_var weight bias use_input_stats",
    **dict.fromkeys(
        (torch.batch_norm, torch.native_batch_norm, _aten.native_batch_norm.default, _aten.cudnn_batch_norm.default),
        "input weight bias running_mean running_var training",
    ),
    torch.instance_norm: "input weight bias running_mean running_var use_input_stats",
}
"""Normalizations that may update running statistics, with the names of their first arguments."""

DISPATCH_VIEWS = frozenset(
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
