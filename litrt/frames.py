"""Modules of torch that choose a fused kernel by looking at their parameters.

`nn.MultiheadAttention`, `nn.TransformerEncoderLayer` and `nn.TransformerEncoder` take their fast path only if no
parameter overrides `__torch_function__` and no hook is registered. So that they choose as the plain model does, their
`forward` is wrapped: while it runs, their own parameters are plain tensors. The fused kernel needs all of them at once
anyway.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from litrt.placeholder import Borrowed, Placeholder

_FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def wrap_fused(module: nn.Module) -> Callable[[], None]:
    """Wraps the fused modules of `module`; returns what takes the wrappers off again."""
    wrapped: list[nn.Module] = []
    for child in module.modules():
        if "forward" in vars(child):
            continue  # somebody else's wrapper
        if isinstance(child, _FUSED):
            _wrap(child, [child])
        elif isinstance(child, nn.TransformerEncoder) and len(child.layers):
            # It looks at its first layer, and that only before the first layer runs.
            _wrap(child, [child.layers[0]])
        else:
            continue
        wrapped.append(child)

    def unwrap() -> None:
        for child in wrapped:
            vars(child).pop("forward", None)

    return unwrap


def _wrap(module: nn.Module, looked_at: list[nn.Module]) -> None:
    forward = module.forward
    early = [] if looked_at == [module] else looked_at

    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _plain_parameters(looked_at) as release:
            for layer in early:
                # Give the layer's weights back when it has run, not when the whole stack has.
                vars(layer)["_litrt_after"] = release
            try:
                return forward(*args, **kwargs)
            finally:
                for layer in early:
                    vars(layer).pop("_litrt_after", None)
                after = vars(module).pop("_litrt_after", None)
                if after is not None:
                    after()

    vars(module)["forward"] = wrapped


@contextmanager
def _plain_parameters(modules: list[nn.Module]) -> Iterator[Callable[[], None]]:
    """Puts plain tensors in the place of the placeholders of `modules` and their children, for a while."""
    borrowed = Borrowed()
    put: list[tuple[dict[str, Any], str, Placeholder]] = []

    def spots() -> list[tuple[dict[str, Any], str, Placeholder]]:
        found: list[tuple[dict[str, Any], str, Placeholder]] = []
        for module in modules:
            for child in module.modules():
                for name, tensor in child._parameters.items():
                    if isinstance(tensor, Placeholder):
                        found.append((child._parameters, name, tensor))
        return found

    def release() -> None:
        while put:
            parameters, name, placeholder = put.pop()
            parameters[name] = placeholder
        borrowed.give_back()

    try:
        borrowed.borrow(lambda: [placeholder for _, _, placeholder in spots()])
        for parameters, name, placeholder in spots():
            parameters[name] = borrowed[placeholder]
            put.append((parameters, name, placeholder))
        yield release
    finally:
        release()
