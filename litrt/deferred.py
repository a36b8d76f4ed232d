"""Runs a constructor without allocating what it makes: every new tensor is a recipe until its values are asked for.

`Deferral` is a dispatch mode, which torch keeps per thread: other threads notice nothing. Under it, operators
that make tensors, and operators on tensors so made, run on the meta device for their shapes and are recorded with their
arguments. Values that Python asks for (`.item()`, `.tolist()`, `bool(...)`) are computed on the spot by replaying what
they depend on, and so are, after the constructor, the tensors that are wanted (`Deferral.materialize`). Replay runs the
same operators on the same arguments in the same order, random ones from the state that the generator had, so the values
are those of a plain construction.

Constants (`torch.tensor(...)`, `torch.from_numpy(...)`) hold data that exists already, and stay as they are.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from litrt.operators import written_by_schema


@dataclass(eq=False)
class Buffer:
    """The storage of deferred tensors: which recorded operators write to it, and its values where they are known."""

    meta: torch.UntypedStorage  # kept alive, so that its address stays its identity
    writes: list[int] = field(default_factory=list)
    values: torch.UntypedStorage | None = None
    n_writes_in_values: int = 0


@dataclass(frozen=True)
class Ref:
    """A deferred tensor as it was when an operator was recorded: a geometry over a buffer."""

    buffer: Buffer
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def over(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """Returns a plain tensor of this geometry over `storage`."""
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)


@dataclass(frozen=True)
class _Op:
    """A recorded call, its tensors replaced by what they referred to."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]
    makes: tuple[tuple[int, Ref], ...]  # position among the flattened results, and the new tensor there
    epoch: int | None  # of the generator's state, for operators that draw from it


class Deferred(torch.Tensor):
    """A tensor that has a shape and a recipe, and no values yet."""

    _litrt_meta: torch.Tensor
    _litrt_deferral: Deferral
    _is_param: bool

    @staticmethod
    def __new__(cls, deferral: Deferral, meta: torch.Tensor) -> Self:
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            meta.size(),
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            device=torch.device("cpu"),
            requires_grad=False,
        )
        self._litrt_meta = meta
        self._litrt_deferral = deferral
        deferral._made.append(weakref.ref(self))
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass  # all is done in __new__

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func in _READERS:
            args = tuple(value._litrt_deferral.value(value) if isinstance(value, Deferred) else value for value in args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        first = next(value for value in _tensors(args, kwargs) if isinstance(value, Deferred))
        return first._litrt_deferral.run(func, tuple(args), dict(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> Deferred:
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        with torch.no_grad():
            copied: Deferred = self.detach().clone()  # type: ignore[assignment]
        if getattr(self, "_is_param", False):
            copied._is_param = True
        copied.requires_grad_(self.requires_grad)
        for name, value in vars(self).items():
            if not name.startswith("_litrt_"):
                vars(copied).setdefault(name, value)
        memo[id(self)] = copied
        return copied


_READERS = frozenset(
    {
        torch.Tensor.numpy,
        torch.Tensor.tolist,
        torch.Tensor.__array__,
        torch.Tensor.__repr__,
        torch.Tensor.__format__,
        torch.Tensor.__reduce_ex__,
        torch.Tensor.untyped_storage,
        torch.Tensor.data_ptr,
    }
)
"""What reads values without an operator."""


class Deferral(TorchDispatchMode):
    """The record of one construction: enter it around the constructor, ask it for values then and afterwards."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ops: list[_Op] = []
        self._made: list[weakref.ref[Deferred]] = []
        self._buffers: dict[int, Buffer] = {}
        self._epochs: list[torch.Tensor] = []  # states of the generator that random operators start from
        self._draws: list[list[int]] = []  # per epoch, the operators that draw, in order

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, tuple(args), dict(kwargs or {}))

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Records `func` where it makes or uses deferred tensors, and runs it where it does not."""
        tensors = _tensors(args, kwargs)
        deferred = [value for value in tensors if isinstance(value, Deferred)]
        if not deferred and not _makes_new(func, tensors):
            return self._run_now(func, args, kwargs)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type != "cpu":
            return self._run_now(func, args, kwargs)
        if kwargs.get("generator") is not None:
            # A generator of the constructor's own, whose state we must not fall behind.
            return self._run_now(func, args, kwargs)
        if any(
            isinstance(value, torch.Tensor) and not isinstance(value, Deferred)
            for value in written_by_schema(func, args, kwargs)
        ):
            return self._run_now(func, args, kwargs)
        try:
            return self._record(func, args, kwargs)
        except (NotImplementedError, RuntimeError):
            # Its result has no shape without values (nonzero, item), or the meta device lacks it. If the call is
            # wrong, it fails on values as well, with torch's own words.
            return self._run_now(func, args, kwargs)

    def value(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a plain tensor with the values that `tensor` has now."""
        return self.materialize([tensor])[0]

    def materialize(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Returns plain tensors with the values of `tensors`; those that share memory go on sharing it."""
        with _plain():
            refs = [self.ref(tensor) for tensor in tensors]
            self._compute([ref.buffer for ref in refs if ref is not None])
            return [
                tensor if ref is None else ref.over(_values(ref.buffer))
                for tensor, ref in zip(tensors, refs, strict=True)
            ]

    def living(self) -> list[Deferred]:
        """Returns the deferred tensors that somebody still has, after the construction; they can be swapped then."""
        found = [tensor for made in self._made if (tensor := made()) is not None]
        self._made.clear()  # weak references would forbid a swap
        return found

    def ref(self, tensor: torch.Tensor) -> Ref | None:
        """Returns what a deferred tensor refers to now, or None for a tensor that has values."""
        return self._ref(tensor._litrt_meta) if isinstance(tensor, Deferred) else None

    def _ref(self, meta: torch.Tensor) -> Ref:
        storage = meta.untyped_storage()
        buffer = self._buffers.get(storage._cdata)
        if buffer is None:
            buffer = self._buffers[storage._cdata] = Buffer(storage)
        return Ref(buffer, meta.dtype, tuple(meta.size()), tuple(meta.stride()), int(meta.storage_offset()))

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        originals: dict[int, Deferred] = {}

        def on_meta(value: Any) -> Any:
            if isinstance(value, Deferred):
                originals[id(value._litrt_meta)] = value
                return value._litrt_meta
            # A constant among the arguments; one without dimensions may stay where it is, as a number.
            return value.to("meta") if isinstance(value, torch.Tensor) and value.dim() > 0 else value

        with _plain():
            ref_args, ref_kwargs = tree_map(
                lambda value: self._ref(value._litrt_meta) if isinstance(value, Deferred) else value, (args, kwargs)
            )
            meta_args, meta_kwargs = tree_map(on_meta, (args, kwargs))
            if any(argument.name == "device" for argument in func._schema.arguments):
                meta_kwargs["device"] = torch.device("meta")
            made = func(*meta_args, **meta_kwargs)
            flat = tree_flatten(made)[0]
            if any(isinstance(value, torch.Tensor) and not value.is_meta for value in flat):
                raise NotImplementedError(f"{func} has no meta kernel")
            results = [(i, self._ref(value)) for i, value in enumerate(flat) if isinstance(value, torch.Tensor)]
        reads = tuple(
            dict.fromkeys(ref.buffer for ref in tree_flatten((ref_args, ref_kwargs))[0] if isinstance(ref, Ref))
        )
        makes = tuple((i, ref) for i, ref in results if ref.buffer not in reads)
        written = [ref.buffer for ref in written_by_schema(func, ref_args, ref_kwargs) if isinstance(ref, Ref)]
        writes = tuple(dict.fromkeys([*written, *(ref.buffer for _, ref in makes)]))
        if writes:  # a view needs no recipe: its geometry says it all
            self._append(_Op(func, ref_args, ref_kwargs, reads, writes, makes, self._epoch_of(func)))

        if torch.Tag.inplace_view in func.tags:
            _reshape_wrappers(func, args, kwargs)

        def wrap(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            # In-place operators return their argument: the same object, not another one over it.
            original = originals.get(id(value))
            return Deferred(self, value) if original is None else original

        return tree_map(wrap, made)

    def _append(self, op: _Op) -> None:
        number = len(self._ops)
        self._ops.append(op)
        for buffer in op.writes:
            buffer.writes.append(number)
        if op.epoch is not None:
            self._draws[op.epoch].append(number)

    def _epoch_of(self, func: Any) -> int | None:
        """Returns which state of the generator `func` draws after; recorded operators leave the state as it is."""
        if not _draws(func):
            return None
        state = torch.get_rng_state()
        if not self._epochs or not torch.equal(self._epochs[-1], state):
            self._epochs.append(state)
            self._draws.append([])
        return len(self._epochs) - 1

    def _run_now(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs `func` on values. What it writes to stays deferred: its new values are its recipe from then on."""
        deferred = [value for value in _tensors(args, kwargs) if isinstance(value, Deferred)]
        originals: dict[int, Deferred] = {}
        with _plain():
            reals = dict(zip(map(id, deferred), self.materialize(deferred), strict=True))
            originals = {id(reals[id(value)]): value for value in deferred}
            written = [value for value in written_by_schema(func, args, kwargs) if isinstance(value, Deferred)]
            for value in written:
                # The values that were handed out must not change with this write.
                ref = self._ref(value._litrt_meta)
                originals.pop(id(reals[id(value)]))
                ref.buffer.values = _values(ref.buffer).clone()  # type: ignore[no-untyped-call]
                reals[id(value)] = ref.over(ref.buffer.values)
                originals[id(reals[id(value)])] = value
            if _draws(func) and kwargs.get("generator") is None:
                self._draw_what_was_recorded()
            real_args, real_kwargs = tree_map(lambda value: reals.get(id(value), value), (args, kwargs))
            result = func(*real_args, **real_kwargs)
            for value in written:
                buffer = self._ref(value._litrt_meta).buffer
                constant = Ref(buffer, torch.uint8, (buffer.meta.nbytes(),), (1,), 0)
                values = constant.over(_values(buffer)).clone()
                self._append(_Op(_constant, (values,), {}, (), (buffer,), ((0, constant),), None))
                buffer.values, buffer.n_writes_in_values = None, 0
        return tree_map(lambda value: originals.get(id(value), value), result)

    # Computing values.

    def _compute(self, wanted: Sequence[Buffer]) -> None:
        """Replays what `wanted` depends on, and nothing else, unless its values are known."""
        wanted = [buffer for buffer in dict.fromkeys(wanted) if not _is_known(buffer)]
        if not wanted:
            return
        needed = self._needed(wanted)
        storages: dict[Buffer, torch.UntypedStorage] = {}
        with torch.random.fork_rng(devices=[]):
            epoch, n_drawn = -1, 0
            for number in sorted(needed):
                op = self._ops[number]
                if op.epoch is not None:
                    if op.epoch != epoch:
                        epoch, n_drawn = op.epoch, 0
                        torch.set_rng_state(self._epochs[epoch])
                    # The generator must be where it was: draw what was drawn before, into memory that is dropped.
                    while self._draws[epoch][n_drawn] != number:
                        self._replay(self._ops[self._draws[epoch][n_drawn]], {})
                        n_drawn += 1
                    n_drawn += 1
                self._replay(op, storages)
        for buffer in wanted:
            buffer.values = storages.get(buffer) or _allocate(buffer)
            buffer.n_writes_in_values = len(buffer.writes)

    def _needed(self, wanted: Sequence[Buffer]) -> set[int]:
        needed: set[int] = set()
        stack = [(buffer, len(self._ops)) for buffer in wanted]
        done: dict[Buffer, int] = {}
        while stack:
            buffer, end = stack.pop()
            start = done.get(buffer, 0)
            done[buffer] = max(start, end)
            for number in buffer.writes:
                if start <= number < end and number not in needed:
                    needed.add(number)
                    op = self._ops[number]
                    stack.extend((read, number) for read in op.reads)
                    if op.epoch is not None:
                        # What was drawn before has to be drawn again; where that needs values, they are needed.
                        for earlier in self._draws[op.epoch]:
                            if earlier < number and len(self._ops[earlier].reads) > 1:
                                stack.extend((read, earlier) for read in self._ops[earlier].reads)
        return needed

    def _replay(self, op: _Op, storages: dict[Buffer, torch.UntypedStorage]) -> None:
        def real(value: Any) -> Any:
            if not isinstance(value, Ref):
                return value
            if value.buffer not in storages:
                storages[value.buffer] = _allocate(value.buffer)
            return value.over(storages[value.buffer])

        args, kwargs = tree_map(real, (op.args, op.kwargs), is_leaf=lambda value: isinstance(value, Ref))
        flat = tree_flatten(op.func(*args, **kwargs))[0]
        for position, ref in op.makes:
            made = flat[position]
            if (tuple(made.size()), tuple(made.stride()), made.storage_offset()) == (ref.size, ref.stride, ref.offset):
                storages[ref.buffer] = made.untyped_storage()
            else:
                storages[ref.buffer] = _allocate(ref.buffer)
                ref.over(storages[ref.buffer]).copy_(made)

    def _draw_what_was_recorded(self) -> None:
        """Moves the generator to where a plain construction would have it, for an operator that cannot wait."""
        state = torch.get_rng_state()
        if self._epochs and torch.equal(self._epochs[-1], state):
            for number in self._draws[-1]:
                self._replay(self._ops[number], {})


@contextlib.contextmanager
def _plain() -> Iterator[None]:
    """Runs operators on plain tensors: no mode of ours or of the caller's, no gradients, no inference tensors."""
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        yield


def _reshape_wrappers(func: Any, args: Any, kwargs: Any) -> None:
    """Gives the wrappers the geometry that `func` (`t_`, `squeeze_`) has given the tensors inside."""
    with no_dispatch():
        was_included = torch._C._meta_in_tls_dispatch_include()
        torch._C._set_meta_in_tls_dispatch_include(True)
        try:
            func(*args, **kwargs)
        finally:
            torch._C._set_meta_in_tls_dispatch_include(was_included)


def _constant(values: torch.Tensor) -> torch.Tensor:
    return values.clone()


def _tensors(args: Any, kwargs: Any) -> list[torch.Tensor]:
    return [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]


def _makes_new(func: Any, tensors: Sequence[torch.Tensor]) -> bool:
    """Says whether `func` makes a tensor out of numbers alone."""
    if not tensors:
        return bool(not func._schema.is_mutable)
    name: str = func._schema.name.removeprefix("aten::")
    return name.startswith("new_") or name.endswith("_like")


def _draws(func: Any) -> bool:
    seeded: bool = torch.Tag.nondeterministic_seeded in func.tags
    return seeded


def _is_known(buffer: Buffer) -> bool:
    return buffer.values is not None and buffer.n_writes_in_values == len(buffer.writes)


def _values(buffer: Buffer) -> torch.UntypedStorage:
    assert buffer.values is not None
    return buffer.values


def _allocate(buffer: Buffer) -> torch.UntypedStorage:
    return torch.UntypedStorage(buffer.meta.nbytes())  # type: ignore[no-untyped-call]
