"""Weights that stay are plain tensors, so that using them costs nothing.

Note on writes. Nothing stands between a plain tensor and code that writes to it. torch counts the writes to a tensor;
`check` looks whether it has counted any, between passes, before a tensor gives its place up, and at the end. What was
written is read from the store again before anything else uses it, and so is all else that stays. Not counted are writes
to `weight.data`, by which adapters are merged, and writes in inference mode. On the host a checksum tells of these when
a tensor is to give its place up: then it does not, and keeps its values, as it would in the plain model.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from litrt.crc import extend_crc
from litrt.errors import LitrtError, WeightWriteError
from litrt.pipeline import Pipeline
from litrt.placeholder import Placeholder
from litrt.units import format_names

_version: Callable[[torch.Tensor], int] = torch._C.TensorBase._version.__get__  # type: ignore[attr-defined]
_address: Callable[[torch.Tensor], int] = torch._C.TensorBase.data_ptr


@dataclass(slots=True)
class _Plain:
    """An object that was a placeholder and is a plain tensor for now.

    Attributes:
        spot: The object.
        placeholder: What it was, for now in an object of its own.
        version: Of writes, as torch counts them, that were before.
        address: Of its bytes.
    """

    spot: torch.Tensor
    placeholder: torch.Tensor
    version: int
    address: int

    @property
    def is_written(self) -> bool:
        """Whether somebody has written to it, or given it other bytes."""
        if isinstance(self.spot, Placeholder):
            return False  # again, thanks to another thread
        return (_version(self.spot), _address(self.spot)) != (self.version, self.address)

    def accept(self) -> None:
        """Forgets what was written."""
        if not isinstance(self.spot, Placeholder):
            self.version, self.address = _version(self.spot), _address(self.spot)


class Residents:
    """Swaps placeholders for plain tensors and back, object by object, so that every reference follows.

    No placeholder becomes plain while an operator of another thread uses weights: it looks at it again when it is done.

    Args:
        placeholders: The placeholder objects of every segment.
        pipeline: Has the segments.
        read: Reads a segment from the store, into memory of its own.
        is_host: The host can read what stays.
    """

    def __init__(
        self,
        placeholders: dict[int, list[Placeholder]],
        pipeline: Pipeline,
        read: Callable[[int], torch.Tensor],
        *,
        is_host: bool,
    ) -> None:
        self._objects: dict[int, list[torch.Tensor]] = {index: [*spots] for index, spots in placeholders.items()}
        self._pipeline = pipeline
        self._read = read
        self._is_host = is_host
        self._parked: dict[int, list[_Plain]] = {}
        self._checksums: dict[int, int | None] = {}  # of what is parked
        self._by_object: dict[int, _Plain] = {}
        self._watched: tuple[list[torch.Tensor], list[int], list[int]] = [], [], []
        self._lost: list[int] = []  # written to, and evicted since
        self.all_plain = True

    def settle(self, indices: Iterable[int]) -> None:
        """Makes plain tensors of the placeholders of resident segments.

        One that torch refuses to swap (somebody holds a weak reference to it) stays a placeholder, which serves the
        same bytes at the cost of an interception.
        """
        with self._pipeline.alone():
            for index in indices:
                if index not in self._parked:
                    self._settle(index)
            self._watch()

    def _settle(self, index: int) -> None:
        parked: list[_Plain] = []
        self._parked[index] = parked
        for spot in self._objects.get(index, ()):
            plain = self._pipeline.resident_tensor(index)
            if plain is None:
                del self._parked[index]
                self.all_plain = False
                return
            if isinstance(spot, nn.Parameter):
                plain = nn.Parameter(plain, requires_grad=spot.requires_grad)
            # Noted before it is done: an interrupt may come right after it.
            parked.append(_Plain(spot, plain, _version(plain), _address(plain)))
            if not _swap(spot, plain):
                parked.pop()
                self.all_plain = False
        if parked and self._is_host:
            self._checksums[index] = self._checksum(index)

    def find(self, tensor: torch.Tensor) -> Placeholder | None:
        """Returns the placeholder that a tensor is, or is in the place of; None for one that is not served."""
        if self._pipeline.is_closed:
            return None
        if isinstance(tensor, Placeholder):
            return tensor if tensor._litrt_source is self._pipeline else None
        plain = self._by_object.get(id(tensor))
        if plain is None:
            return None
        assert isinstance(plain.placeholder, Placeholder)
        return plain.placeholder

    def evict(self, index: int) -> bool:
        """Puts the placeholders of a segment back; says whether all could be, so that nothing holds its bytes."""
        is_there = index in self._parked
        left = self._evict(index)
        if is_there:
            self._watch()
        return not left

    def _evict(self, index: int, *, look: bool = True) -> list[_Plain]:
        """Returns what could not be put back."""
        parked = self._parked.get(index, [])
        if look and any(plain.is_written for plain in parked):
            self._lost.append(index)
            self._restore(index)  # an alias may hold the bytes, and revive them
        elif look and self._has_changed(index):
            return parked
        left = [plain for plain in parked if not _put_back(plain)]
        if left:
            self._parked[index] = left
        else:
            self._parked.pop(index, None)
            self._checksums.pop(index, None)
        return left

    def _has_changed(self, index: int) -> bool:
        """Says whether a weight that stays, whose bytes are where they were, has other values than it had."""
        return index in self._checksums and self._checksums[index] != self._checksum(index)

    def _checksum(self, index: int) -> int | None:
        """Returns that of a segment in memory of the host; None where it is not there any more."""
        memory = self._pipeline.memory(index)
        return extend_crc(0, memory) if memory is not None else None

    def evict_all(self, *, look: bool = True) -> None:
        """Puts all placeholders back where that is possible; other tensors keep their bytes alive by themselves.

        Args:
            look: For writes to them.
        """
        for index in list(self._parked):
            self._evict(index, look=look)
        self._watch()
        self.all_plain = True

    # Writes.

    def check(self, *, addresses: bool = True) -> None:
        """Looks for writes to weights that stay.

        Called between passes. What is read again is in memory of its own for a moment, beside the budget.

        Args:
            addresses: Look also for those that were given other bytes.

        Raises:
            WeightWriteError: Where there were any, once all that stay have their true values again.
            CorruptWeightError: Where these cannot be read: then, as long as they cannot.
        """
        if not self._lost and self._is_untouched(addresses):
            return
        with self._pipeline.alone():
            written = self._written()
            if not written:
                return  # another thread has just evicted one
            for index in self._parked:
                self._restore(index)
            self._watch()
            self._lost.clear()
        self._refuse(written)

    def check_at_end(self) -> None:
        """Looks for writes, and leaves what was written.

        Raises:
            WeightWriteError: Where there were any.
        """
        written = self._written()
        self._lost.clear()
        for parked in self._parked.values():
            for plain in parked:
                plain.accept()
        if written:
            self._refuse(written)

    def _written(self) -> list[int]:
        """Returns what was written to since it settled, evicted since or not."""
        there = [index for index, parked in self._parked.items() if any(plain.is_written for plain in parked)]
        return list(dict.fromkeys([*there, *self._lost]))

    def _refuse(self, written: list[int]) -> None:
        names = [self._pipeline.cache.entries[index].segment.name for index in written]
        raise WeightWriteError(
            f"somebody has written to {format_names(names)}: litrt serves weights read-only, and what was written is "
            "gone. Change the checkpoint and convert it again; or rt.detach() gives a plain module, which can be "
            "changed.",
            name=names[0],
        )

    def _is_untouched(self, look_at_addresses: bool) -> bool:
        spots, versions, addresses = self._watched
        try:
            if [spot._version for spot in spots] != versions:
                return False
            return not look_at_addresses or [*map(_address, spots)] == addresses
        except (RuntimeError, LitrtError):
            return False  # another thread has just made one a placeholder, which has no address

    def _watch(self) -> None:
        plains = [plain for parked in self._parked.values() for plain in parked]
        self._by_object = {id(plain.spot): plain for plain in plains}
        self._watched = (
            [plain.spot for plain in plains],
            [plain.version for plain in plains],
            [plain.address for plain in plains],
        )

    def _restore(self, index: int) -> None:
        """Gives plain tensors their true values again."""
        real = self._read(index)
        with torch.inference_mode(False), torch.no_grad():
            tensor = self._pipeline.resident_tensor(index)
            if tensor is None:
                return
            tensor.copy_(real)
            for plain in self._parked[index]:
                if _address(plain.spot) != plain.address:
                    again = self._pipeline.resident_tensor(index)
                    assert again is not None
                    plain.spot.data = again
                plain.accept()

    def detach(self) -> None:
        """Puts plain tensors with memory of their own in the place of all placeholders, and of views of them.

        Raises:
            LitrtError: If torch refuses to swap one of them.
        """
        self._parked.clear()
        self._checksums.clear()
        self._watch()
        views: dict[int, list[Placeholder]] = {}
        for thing in gc.get_objects():
            if issubclass(type(thing), Placeholder) and thing._litrt_source is self._pipeline:
                views.setdefault(thing._litrt_index, []).append(thing)
        for index, spots in self._objects.items():
            plain = next((spot for spot in spots if not isinstance(spot, Placeholder)), None)
            real = self._read(index) if plain is None else plain.detach().clone()
            objects = {id(spot): spot for spot in (*spots, *views.get(index, ()))}
            for spot in objects.values():
                with torch._C.DisableTorchFunctionSubclass():
                    made = real.as_strided(spot.size(), spot.stride(), spot.storage_offset())
                if isinstance(spot, nn.Parameter):
                    made = nn.Parameter(made, requires_grad=spot.requires_grad)
                if not _swap(spot, made) and isinstance(spot, Placeholder):  # a plain one is right as it is
                    raise LitrtError(
                        f"cannot detach {self._pipeline.cache.entries[index].segment.name!r}: somebody holds a weak "
                        "reference to it, or computes with it."
                    )


def _put_back(plain: _Plain) -> bool:
    placeholder: Any = plain.placeholder
    if isinstance(plain.spot, Placeholder):
        return True  # it was, before an interrupt
    if plain.spot.is_leaf:
        placeholder._litrt_requires_grad = plain.spot.requires_grad
    return _swap(plain.spot, plain.placeholder)


def _swap(spot: torch.Tensor, other: torch.Tensor) -> bool:
    """Puts what one object is in the place of the other; says whether it could, and nothing has changed otherwise.

    As `torch.utils.swap_tensors` does, which leaves both objects half swapped where it fails at the end.
    """
    for key, value in vars(spot).items():
        if not key.startswith("_litrt_") and key != "_is_param":
            vars(other)[key] = value
    if weakref.getweakrefs(spot) or weakref.getweakrefs(other):
        return False
    try:
        # Counting references to a parameter, torch makes a view of it and looks at its gradient function.
        with torch.inference_mode(False), torch.enable_grad():
            if not (_is_free(spot) and _is_free(other)):
                return False  # an operator has it as an argument, for example
            _exchange(spot, other)
    except (RuntimeError, AttributeError):
        return False  # below an operator there are no gradient functions
    return True


def _is_free(tensor: torch.Tensor) -> bool:
    """Says whether nothing but the object refers to a tensor: a node, at most, that would add up gradients."""
    n_references: int = tensor._use_count()  # type: ignore[attr-defined]
    if n_references == 2 and tensor.is_leaf:
        node = torch.autograd.graph.get_gradient_edge(tensor).node
        if tensor._use_count() != 2:  # type: ignore[attr-defined]
            return False  # the node was made just now
        node.register_prehook(_refuse_gradient)
        return True
    return n_references <= 1


def _refuse_gradient(_: object) -> NoReturn:
    raise LitrtError(
        "cannot go backward to a weight that has made room since: litrt serves weights without gradients. Make "
        "gradients with the plain module that rt.detach() gives."
    )


def _exchange(one: Any, other: Any, exchange: Callable[[Any, Any], None] = torch._C._swap_tensor_impl) -> None:
    """Exchanges two objects, but for their references.

    Without a call before the last step: where there is one, another thread can have its turn and see half of it.
    """
    class_of_one, class_of_other = one.__class__, other.__class__
    of_one, of_other = one.__dict__, other.__dict__
    one.__class__ = class_of_other
    other.__class__ = class_of_one
    one.__dict__ = of_other
    other.__dict__ = of_one
    try:
        exchange(one, other)
    except RuntimeError:  # of torch; an interrupt comes after it, when it is done
        one.__class__ = class_of_one
        other.__class__ = class_of_other
        one.__dict__ = of_one
        other.__dict__ = of_other
        raise
