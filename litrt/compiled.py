"""What `torch.compile` does not look into: it breaks its graph there, and where it must not, says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])

_WHAT_TO_DO = (
    "Leave fullgraph=True out, and the graph breaks here; or give a budget that holds the whole model, and compile it "
    "after warmup(); or compile, export or script the plain module that rt.detach() gives."
)


def uncompiled(why: str) -> Callable[[_Function], _Function]:
    """Keeps dynamo out of a function; `why` is what it says where it may not break the graph."""

    def decorate(function: _Function) -> _Function:
        disabled: Any = torch._disable_dynamo(function)  # type: ignore[attr-defined]
        disabled._torchdynamo_disable = True
        disabled._torchdynamo_disable_msg = f"{why} {_WHAT_TO_DO}"
        return disabled  # type: ignore[no-any-return]

    return decorate
