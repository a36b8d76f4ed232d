"""What changes the weights of a module one after the other is asked first, so that it changes all or nothing.

`module.to(...)`, `half()`, `share_memory()` and their like go through `Module._apply`, and `load_state_dict` through
`Module._load_from_state_dict`. Weights that stay are plain tensors, which would be converted or written to until the
first weight that streams refuses. What changes no served weight, as `module.to("cpu")` on the CPU, does what it does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from litrt.errors import WeightWriteError
from litrt.operators import CONVERSIONS, METADATA, REQUIRES_GRAD_GET
from litrt.placeholder import Placeholder
from litrt.views import asked_for, converts_nothing

Asked = tuple[torch.device | None, torch.dtype | None, torch.memory_format | None] | None

Find = Callable[[torch.Tensor], Placeholder | None]
"""Returns the placeholder that a parameter or buffer is or was, or None for a tensor that is not served."""


def guard(module: nn.Module, find: Find) -> Callable[[], None]:
    """Guards `module` and its children; returns what takes the guards off again."""
    guarded = [child for child in module.modules() if not {"_apply", "_load_from_state_dict"} & vars(child).keys()]
    for child in guarded:
        vars(child)["_apply"] = _Guard(child, "_apply", functools.partial(_apply, find))
        vars(child)["_load_from_state_dict"] = _Guard(child, "_load_from_state_dict", functools.partial(_load, find))
        if isinstance(child, nn.RNNBase):
            vars(child)["_init_flat_weights"] = _Guard(child, "_init_flat_weights", _list_weights)
            child._flat_weight_refs = _references(child._flat_weights)

    def unguard() -> None:
        for child in guarded:
            for name in ("_apply", "_load_from_state_dict", "_init_flat_weights"):
                vars(child).pop(name, None)

    return unguard


Norm = nn.modules.batchnorm._NormBase


def norms(module: nn.Module) -> list[Norm]:
    """Returns those of the children that update running statistics in training mode."""
    return [child for child in module.modules() if isinstance(child, Norm) and child.running_mean is not None]


def check_eval(norms: Iterable[Norm], find: Find) -> None:
    """Raises WeightWriteError where running statistics that are served would be updated: torch does not count that."""
    for norm in norms:
        placeholder = find(norm.running_mean) if norm.training and norm.running_mean is not None else None
        if placeholder is not None:
            name = placeholder._litrt_name
            raise WeightWriteError(
                f"cannot update {name!r} in training mode: litrt serves weights read-only. Put what has running "
                "statistics in eval mode: rt.module.eval(), or eval() of that layer alone.",
                name=name,
            )


class _Guard:
    """Stands in the place of a method of one module. In a copy of the module, there is the method itself."""

    def __init__(self, module: nn.Module, name: str, call: Callable[..., Any]) -> None:
        self._module = module
        self._name = name
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._module, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (getattr(type(self._module), self._name), self._module)


def _apply(find: Find, module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    """Does what `module._apply` does, unless `fn` would change a weight that is served."""
    for tensor in _tensors(module, recurse):
        placeholder = find(tensor)
        if placeholder is not None:
            stand_in = _StandIn.of(placeholder)
            with torch.no_grad():
                if fn(stand_in) is not stand_in:
                    _refuse(stand_in, fn, None)
    method = type(module)._apply
    if method in (nn.Module._apply, nn.RNNBase._apply):
        if recurse:
            for child in module.children():
                child._apply(fn)  # type: ignore[no-untyped-call]
        if all(find(tensor) is not None for tensor in _tensors(module, recurse=False)):
            return module
        recurse = False
    return method(module, fn, recurse)  # type: ignore[no-untyped-call]


def _load(
    find: Find, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any], *args: Any
) -> None:
    """Does what `module._load_from_state_dict` does, unless it would copy to a weight that is served."""
    if not metadata.get("assign_to_params_buffers", False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            placeholder = find(tensor) if tensor is not None and prefix + name in state_dict else None
            if placeholder is not None:
                stored = placeholder._litrt_name
                raise WeightWriteError(
                    f"cannot load a state dict into {stored!r}: litrt serves weights read-only. Convert it, with "
                    "litrt.convert(state_dict, path), and make a litrt.Runtime on that store; or leave the names that "
                    "litrt serves out of it. assign=True puts your tensors in the place of these, outside the budget. "
                    "No served weight was changed.",
                    name=stored,
                )
    type(module)._load_from_state_dict(module, state_dict, prefix, metadata, *args)


def _list_weights(module: nn.RNNBase) -> None:
    """Does what `module._init_flat_weights` does for a module whose weights were exchanged, without weak references."""
    module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]
    module._flat_weight_refs = _references(module._flat_weights)


def _references(weights: Iterable[torch.Tensor | None]) -> list[Any]:
    """Returns what stands for weak references to weights: these would forbid to swap them."""
    return [None if weight is None else functools.partial(_itself, weight) for weight in weights]


def _itself(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _tensors(module: nn.Module, recurse: bool) -> Iterable[torch.Tensor]:
    yield from module.parameters(recurse)
    yield from module.buffers(recurse)


class _StandIn(Placeholder):
    """A weight that says what it is, takes what changes nothing, and refuses all else without being loaded."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self = next(arg for arg in (*args, *kwargs.values()) if isinstance(arg, _StandIn))
        if func == REQUIRES_GRAD_GET:
            return self._litrt_requires_grad
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in CONVERSIONS and args and args[0] is self and converts_nothing(self, func, args[1:], kwargs):
            return self
        return _refuse(self, func, asked_for(func, args[1:], kwargs) if func in CONVERSIONS else None)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        self = next(arg for arg in (*args, *(kwargs or {}).values()) if isinstance(arg, _StandIn))
        _refuse(self, func, None)


def _refuse(placeholder: Placeholder, func: Callable[..., Any], asked: Asked) -> NoReturn:
    name, dtype = placeholder._litrt_name, placeholder._litrt_dtype
    with torch._C.DisableTorchFunctionSubclass():
        device = placeholder.device
    if asked is not None and asked[0] is not None and asked[0].type == "meta":
        advice = (
            "What a model without values is good for, the placeholders of litrt are: they load nothing by themselves"
        )
    elif asked is not None and asked[1] not in (None, dtype):
        advice = f"Serve it in another dtype with litrt.Runtime(..., dtype={asked[1]})"
    elif asked is not None and asked[0] is not None:
        advice = f"Serve it on another device with litrt.Runtime(..., device={str(asked[0])!r})"
    elif func is torch.Tensor.share_memory_:
        advice = "Make a litrt.Runtime in every process that uses one"
    else:
        advice = "rt.detach() gives a plain module, with all weights loaded, that can be changed"
    what = getattr(func, "__name__", str(func))
    raise WeightWriteError(
        f"cannot convert {name!r} ({what}): litrt serves it from a store, as {dtype} on {str(device)!r}. {advice}. "
        "Nothing was changed.",
        name=name,
    )
