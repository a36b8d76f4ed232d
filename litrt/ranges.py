"""Ranges in a profiler's timeline, named by the modules whose weights are read, copied and waited for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch


def named_range(what: str, names: Iterable[str]) -> AbstractContextManager[Any]:
    """Returns a context that a running profiler shows as `litrt <what> <modules>`; one that costs nothing otherwise.

    Args:
        what: "read", "copy" or "wait".
        names: Weights; their modules are named.
    """
    if not torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        return contextlib.nullcontext()
    modules = dict.fromkeys(name.rpartition(".")[0] or name for name in names)
    return torch.profiler.record_function(f"litrt {what} {', '.join(modules)}")
