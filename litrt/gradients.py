"""There are no gradients through weights that are served; whoever asks for them is told so, and gets no wrong ones.

An operator that uses such a weight records nothing for a backward pass, which would have to keep the weight. A sum of
its result and of what recorded (a residual connection) would have a gradient with a part missing. So where an argument
requires a gradient, the result does too, and the backward pass that arrives there is an error.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch._C._functorch import TransformType, get_interpreter_stack, peek_interpreter_stack
from torch.utils._pytree import tree_leaves, tree_map

from litrt.errors import LitrtError

_WHAT_TO_DO = (
    "litrt serves weights for inference, without gradients. rt.detach() gives a plain module, with all weights loaded, "
    "that has them"
)


def is_transformed() -> bool:
    """Says whether a transform of `torch.func` is under way: `vmap`, `jvp`, `grad` and their like."""
    return peek_interpreter_stack() is not None


def check_transforms(what: str) -> None:
    """Raises LitrtError inside a transform of `torch.func` that goes backward, as `grad`, `vjp` and `jacrev` do."""
    if any(interpreter.key() == TransformType.Grad for interpreter in get_interpreter_stack() or ()):
        raise LitrtError(
            f"cannot differentiate {what} backward: {_WHAT_TO_DO}. torch.func.jvp and jacfwd go forward, and work."
        )


def asked_for(values: Any, *, besides: type) -> bool:
    """Says whether tensors among `values` ask for gradients, those of a type left out."""
    return torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and not isinstance(value, besides) and value.requires_grad
        for value in tree_leaves(values)
    )


def refused(result: Any, what: str) -> Any:
    """Returns `result` with tensors through which there is no way back.

    Raises:
        LitrtError: Inside a transform of `torch.func`, which has no such tensors.
    """
    if is_transformed():
        raise LitrtError(
            f"cannot record gradients of {what} inside a transform of torch.func: {_WHAT_TO_DO}. torch.vmap, "
            "torch.func.jvp and jacfwd work under torch.no_grad()."
        )

    def refuse(value: Any) -> Any:
        if type(value) is not torch.Tensor or value.requires_grad or value.is_inference():
            return value
        if not (value.is_floating_point() or value.is_complex()) or value.layout is not torch.strided:
            return value
        # A view that was made without gradients could not be written to; callers may write to their activations.
        fresh = value.detach() if value._is_view() else value
        return _NoWayBack.apply(torch.empty(0, requires_grad=True), fresh, what)  # type: ignore[no-untyped-call]

    return tree_map(refuse, result)


class _NoWayBack(torch.autograd.Function):
    """Is the identity, and an error on the way back."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, value: torch.Tensor, what: str) -> torch.Tensor:
        ctx.what = what
        ctx.mark_dirty(value)  # so that what comes out is no view, and may be written to
        return value

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise LitrtError(f"cannot differentiate {ctx.what}: {_WHAT_TO_DO}.")
