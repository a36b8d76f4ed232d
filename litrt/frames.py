"""Modules of torch that choose a fused kernel by looking at their parameters.

`nn.MultiheadAttention`, `nn.TransformerEncoderLayer` and `nn.TransformerEncoder` take their fast path only if no
parameter overrides `__torch_function__` and no hook is registered. So that they choose as the plain model does, their
`forward` is wrapped. While one of the first two runs, its own parameters are plain tensors: the fused kernel needs all
of them at once anyway. An encoder looks at the parameters of its first layer, does not compute with them, and keeps
them in a local variable until its last layer has run: it gets placeholders that it takes for plain tensors.

One thread at a time runs such a module: what is put in its place is there for all.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn

from torch import nn

from litrt.borrow import Borrowed, let_go_of_values, no_autocast_cache
from litrt.errors import LitrtError
from litrt.placeholder import Placeholder, Unseen

_FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)

_Spot = tuple[dict[str, Any], str, Placeholder]


def wrap_fused(module: nn.Module) -> Callable[[], None]:
    """Wraps the fused modules of `module`; returns what takes the wrappers off again."""
    wrapped: list[nn.Module] = []
    lock = threading.RLock()
    for child in module.modules():
        if "forward" in vars(child):
            continue  # somebody else's wrapper
        if isinstance(child, _FUSED):
            _wrap(child, lock, functools.partial(_plain_parameters, child))
        elif isinstance(child, nn.TransformerEncoder) and len(child.layers):
            _wrap(child, lock, functools.partial(_unseen_parameters, child.layers[0]))
        else:
            continue
        wrapped.append(child)

    def unwrap() -> None:
        for child in wrapped:
            vars(child).pop("forward", None)
            vars(child).pop("__deepcopy__", None)

    return unwrap


def _wrap(module: nn.Module, lock: threading.RLock, around: Callable[[], AbstractContextManager[None]]) -> None:
    forward = module.forward

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with lock, around():
            return forward(*args, **kwargs)

    vars(module)["forward"] = wrapped
    vars(module)["__deepcopy__"] = refuse_copy


def refuse_copy(memo: Any) -> NoReturn:
    """Stands in for the `__deepcopy__` of a module with a wrapped `forward`: the copy's would run the original."""
    raise LitrtError(
        "cannot copy a module that litrt runs: make another litrt.Runtime on the store, or a plain module with "
        "rt.detach(). Parts of it that have no fused kernel can be copied."
    )


def _spots(module: nn.Module) -> list[_Spot]:
    """Returns where `module` and its children have placeholders among their parameters."""
    return [
        (child._parameters, name, tensor)  # type: ignore[misc]
        for child in module.modules()
        for name, tensor in child._parameters.items()
        if isinstance(tensor, Placeholder)
    ]


@contextmanager
def _plain_parameters(module: nn.Module) -> Iterator[None]:
    """Puts plain tensors in the place of the placeholders of `module` and its children, for a while."""
    borrowed = Borrowed()
    put: list[_Spot] = []
    try:
        borrowed.borrow(lambda: [placeholder for _, _, placeholder in _spots(module)])
        for parameters, name, placeholder in _spots(module):
            parameters[name] = borrowed[placeholder]
            put.append((parameters, name, placeholder))
        with no_autocast_cache():
            yield
    except BaseException as error:
        let_go_of_values(error)
        raise
    finally:
        for parameters, name, placeholder in put:
            parameters[name] = placeholder
        borrowed.give_back()


@contextmanager
def _unseen_parameters(module: nn.Module) -> Iterator[None]:
    """Puts placeholders that nobody sees in the place of those of `module` and its children, for a while."""
    spots = _spots(module)
    try:
        for parameters, name, placeholder in spots:
            parameters[name] = Unseen.of(placeholder)
        yield
    finally:
        for parameters, name, placeholder in spots:
            parameters[name] = placeholder
