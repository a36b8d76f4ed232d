"""Which other threads compute with a model's weights where these are plain tensors, so that nobody is asked for them.

Only looked at where there would be an error otherwise. A plain weight that an operator of another thread uses cannot
make room; once that operator is done, it can.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Set
from types import FrameType

from torch import nn

from litrt.turns import current_frames

_CALLS = frozenset({"_call_impl", "forward"})
"""Functions in whose frames `self` is a module."""


_PASS = "one_pass"
"""Function in which threads wait for their pass to begin."""


class Onlookers:
    """Those of one model.

    Args:
        module: The model; nothing keeps it alive here.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def are_computing(self, waiting: Set[int] = frozenset()) -> bool:
        """Says whether another thread is in a module of the model, on its way to being done with it.

        Args:
            waiting: Threads that are known to wait, and for what.
        """
        module = self._module()
        modules = {id(part) for part in module.modules()} if module is not None else set()
        known = {threading.get_ident(), *waiting}
        return any(_computes(frame, modules) for thread, frame in current_frames().items() if thread not in known)


def _computes(frame: FrameType | None, modules: set[int]) -> bool:
    while frame is not None:
        if frame.f_code.co_name == _PASS and frame.f_globals.get("__name__") == "litrt.passes":
            return False  # before a pass, or after one
        if frame.f_code.co_name in _CALLS and id(frame.f_locals.get("self")) in modules:
            return True
        frame = frame.f_back
    return False
