"""Which calls are passes: those of the root's `forward`, and of other methods of the model that were warmed up."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from litrt import gradients
from litrt.compiled import uncompiled
from litrt.frames import refuse_copy, wrap_fused
from litrt.placeholder import Placeholder

FORWARD = "forward"

_uncompiled = uncompiled("litrt sees a pass begin and end here.")


class Passes:
    """The calls of one model that are passes, one at a time. A call inside of another one is a part of it.

    Args:
        module: The model.
        begins: Called before a pass, with its method and its inputs; if it fails, there is no pass.
        ends: Called after a pass, with whether that came to its end.

    Attributes:
        lock: Held during a pass; who holds it keeps others from beginning one.
    """

    def __init__(
        self, module: nn.Module, begins: Callable[[str, Any, Any], None], ends: Callable[[bool], None]
    ) -> None:
        self.lock = threading.RLock()
        self._current: object = None  # the pass that there is
        self._module = module
        self._begins = begins
        self._ends = ends
        self._methods = [FORWARD]
        self._unhooks: list[Callable[[], None]] = []

    @property
    def is_in_one(self) -> bool:
        """Whether there is a pass; for those who hold the lock."""
        return self._current is not None

    @property
    def are_seen(self) -> bool:
        """Whether anything is wrapped."""
        return bool(self._unhooks)

    def see(self) -> None:
        """Wraps the methods, and torch's fused modules, if they are not wrapped."""
        if not self._unhooks:
            self._unhooks.append(wrap_fused(self._module))
            for method in self._methods:
                self._unhooks.append(self._wrap(method))

    def unsee(self) -> None:
        """Takes the wrappers off."""
        while self._unhooks:
            self._unhooks.pop()()

    def add(self, method: str) -> None:
        """Makes passes of the calls of a method.

        Args:
            method: Its name, with dots where it is a part's: `"decode"`, `"vae.decode"`; a part's name alone is its
                `forward`.

        Raises:
            ValueError: If the model has no such method.
        """
        owner, name = self._found(method)
        path = next(path for path, part in self._module.named_modules() if part is owner)
        found = f"{path}.{name}" if path else name
        if found not in self._methods:
            self._methods.append(found)
            if self._unhooks:
                self._unhooks.append(self._wrap(found))

    def function(self, method: str) -> Callable[..., Any]:
        """Returns what to call for a method: the module itself, with its hooks, for a `forward`."""
        owner, name = self._found(method)
        return owner if name == FORWARD else getattr(owner, name)

    def _found(self, method: str) -> tuple[nn.Module, str]:
        """Returns the module that has a method, and the method's name there."""
        owner: Any = self._module
        *_, name = path = method.split(".")
        try:
            for part in path[:-1]:
                owner = getattr(owner, part)
            found = getattr(owner, name)
        except AttributeError:
            found = None
        if isinstance(found, nn.Module):
            owner, name, found = found, FORWARD, found.forward
        known = {id(part) for part in self._module.modules()}
        if not callable(found) or id(owner) not in known:
            raise ValueError(
                f"{type(self._module).__name__} has no method {method!r}: give the name of one that it or a part of it "
                'has, such as "forward", "decode" or "encoder".'
            )
        return owner, name

    def _wrap(self, method: str) -> Callable[[], None]:
        """Wraps a method; returns what takes the wrapper off."""
        owner, name = self._found(method)
        inner = getattr(owner, name)  # which may itself be wrapped

        @functools.wraps(inner)
        def one_pass(*args: Any, **kwargs: Any) -> Any:
            this: list[object] = []  # which is like no other one
            try:
                if not self._begin(this, method, args, kwargs):
                    return inner(*args, **kwargs)
                with torch.no_grad():
                    result = inner(*args, **kwargs)
                self._end(this, is_whole=True)
            except BaseException:
                self._end(this, is_whole=False)
                raise
            return self._without_gradients(result, args, kwargs)

        own = {key: vars(owner)[key] for key in (name, "__deepcopy__") if key in vars(owner)}
        vars(owner)[name] = one_pass
        vars(owner)["__deepcopy__"] = refuse_copy

        def unwrap() -> None:
            for key in (name, "__deepcopy__"):
                vars(owner).pop(key, None)
            vars(owner).update(own)

        return unwrap

    @_uncompiled
    def _begin(self, this: object, method: str, args: Any, kwargs: Any) -> bool:
        """Begins a pass, unless this thread is in one; other threads wait for its end."""
        with self.lock:
            if self._current is not None:
                return False
            # Interrupts come after a call: the lock is held from here on wherever there is a pass.
            self._current = this
            self.lock.acquire()
            try:
                gradients.check_transforms("a pass")
                self._begins(method, args, kwargs)
            except BaseException:
                self._current = None
                self.lock.release()
                raise
            return True

    @_uncompiled
    def _end(self, this: object, *, is_whole: bool) -> None:
        """Ends a pass, unless it has ended or was none: called again where an interrupt comes before it is done."""
        if self._current is not this:
            return
        try:
            self._ends(is_whole)
        finally:
            self._current = None
            self.lock.release()

    @_uncompiled
    def _without_gradients(self, result: Any, args: Any, kwargs: Any) -> Any:
        if gradients.asked_for((args, kwargs), besides=Placeholder):
            return gradients.refused(result, "a pass")
        return result

    def forked(self) -> None:
        """Makes a new lock in a process that was forked off: another thread may have held it, which is not here."""
        self.lock = threading.RLock()
