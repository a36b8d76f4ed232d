"""Weights that stay are plain tensors, so that using them costs nothing.

Note on writes. Nothing sees a write to a plain tensor, such as the merge of an adapter. On the host a weight that stays
has a checksum, and one that was written to is not given back: it keeps its values, as it would in the plain model.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable

import torch
from torch import nn

from litrt.crc import extend_crc
from litrt.errors import LitrtError
from litrt.pipeline import Pipeline
from litrt.placeholder import Placeholder


class Residents:
    """Swaps placeholders for plain tensors and back, object by object, so that every reference follows.

    No placeholder becomes plain while an operator of another thread uses weights: it looks at it again when it is done.

    Args:
        placeholders: The placeholder objects of every segment.
        pipeline: Has the segments.
        is_host: The host can read the weights.
    """

    def __init__(self, placeholders: dict[int, list[Placeholder]], pipeline: Pipeline, *, is_host: bool) -> None:
        self._objects: dict[int, list[torch.Tensor]] = {index: [*spots] for index, spots in placeholders.items()}
        self._pipeline = pipeline
        self._is_host = is_host
        self._parked: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._settled: dict[int, int] = {}  # checksums, as they settled
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

    def _settle(self, index: int) -> None:
        parked: list[tuple[torch.Tensor, torch.Tensor]] = []
        for spot in self._objects.get(index, ()):
            plain = self._pipeline.resident_tensor(index)
            if plain is None:
                self.all_plain = False
                return
            if isinstance(spot, nn.Parameter):
                plain = nn.Parameter(plain, requires_grad=spot.requires_grad)
            if _swap(spot, plain):
                parked.append((spot, plain))
            else:
                self.all_plain = False
        self._parked[index] = parked
        if parked and self._is_host:
            self._settled[index] = _fingerprint(parked[0][0])

    def _was_written(self, index: int) -> bool:
        """Says whether a weight that stays has other values than it had, or others in its place (`w.data = ...`)."""
        settled = self._settled.get(index)
        return settled is not None and any(_fingerprint(spot) != settled for spot, _ in self._parked.get(index, ()))

    def evict(self, index: int, *, keep_written: bool = True) -> bool:
        """Puts the placeholders of a segment back; says whether all could be, so that nothing holds its bytes."""
        if keep_written and self._was_written(index):
            return False
        left = [
            (spot, placeholder) for spot, placeholder in self._parked.get(index, ()) if not _swap(spot, placeholder)
        ]
        if left:
            self._parked[index] = left
            return False
        self._parked.pop(index, None)
        self._settled.pop(index, None)
        return True

    def evict_all(self, *, keep_written: bool = True) -> None:
        """Puts all placeholders back where that is possible; other tensors keep their bytes alive by themselves."""
        for index in list(self._parked):
            self.evict(index, keep_written=keep_written)
        self.all_plain = True

    def detach(self, read: Callable[[int], torch.Tensor]) -> None:
        """Puts plain tensors with memory of their own in the place of all placeholders, and of views of them.

        Raises:
            LitrtError: If torch refuses to swap one of them.
        """
        self._parked.clear()
        self._settled.clear()
        views: dict[int, list[Placeholder]] = {}
        for thing in gc.get_objects():
            if issubclass(type(thing), Placeholder) and thing._litrt_source is self._pipeline:
                views.setdefault(thing._litrt_index, []).append(thing)
        for index, spots in self._objects.items():
            plain = next((spot for spot in spots if not isinstance(spot, Placeholder)), None)
            real = read(index) if plain is None else plain.detach().clone()
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


def _fingerprint(spot: torch.Tensor) -> int:
    """Returns the checksum of the memory of a plain tensor; -1 for one that was moved to a device."""
    if spot.device.type != "cpu":
        return -1
    memory = torch.empty(0, dtype=torch.uint8).set_(spot.untyped_storage())
    return extend_crc(0, memory.numpy())


def _swap(spot: torch.Tensor, other: torch.Tensor) -> bool:
    for key, value in vars(spot).items():
        if not key.startswith("_litrt_") and key != "_is_param":
            vars(other).setdefault(key, value)
    try:
        # Counting references to a parameter, torch makes a view of it and looks at its gradient function.
        with torch.inference_mode(False), torch.enable_grad():
            torch.utils.swap_tensors(spot, other)  # type: ignore[no-untyped-call]
    except (RuntimeError, AttributeError):
        # Somebody holds it: an operator whose argument it is, for example, below which there are no gradient functions.
        return False
    return True
