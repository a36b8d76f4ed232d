"""Builds a model with its unmodified constructor, and puts placeholders where its weights belong."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from litrt.deferred import Deferral, Deferred
from litrt.device import Device
from litrt.errors import LitrtError, SkeletonError
from litrt.placeholder import Placeholder
from litrt.rows import Source
from litrt.store import Store
from litrt.tensors import TensorInfo
from litrt.wrappers import is_wrapper, parts

_MAX_NAMES = 10
"""Names that a message lists of each kind; the error's attributes have them all."""


@dataclass(eq=False)
class Slot:
    """A parameter or persistent buffer of a model: one tensor object, under all its names."""

    names: list[str]
    tensor: torch.Tensor
    is_param: bool
    stored: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the model gives it."""
        return tuple(self.tensor.shape)


def build(model_ctor: Callable[[], nn.Module]) -> tuple[nn.Module, Deferral]:
    """Runs `model_ctor` without allocating what it makes. Returns the model, in eval mode, and the record of it.

    Raises:
        TypeError: If it is a module, or does not return one.
        LitrtError: If it makes tensors of a kind that needs values.
    """
    if isinstance(model_ctor, nn.Module):
        raise TypeError(
            f"model_ctor is a {type(model_ctor).__name__}: give what makes the model, not the model: "
            "lambda: MyModel(config)."
        )
    deferral = Deferral()
    try:
        with torch.inference_mode(False), torch.no_grad(), _untracked_views(), deferral:
            module = model_ctor()
    except RuntimeError as error:
        made = re.search(r"Creating a new Tensor subclass (\w+) .* of type Deferred", str(error))
        if made is None:
            raise
        if made[1].startswith("Uninitialized"):
            why = "a lazy module, whose weights have no shape yet. Give every size"
        else:
            why = f"a {made[1]}, a kind of tensor that cannot be built without its values. Build it after litrt.Runtime"
        raise LitrtError(f"the constructor makes {why}.") from error
    if not isinstance(module, nn.Module):
        raise TypeError(f"model_ctor must return an nn.Module, not {type(module).__name__}.")
    return module.eval(), deferral


def _untracked_views() -> Any:
    """Makes views without a reference to what they are views of, which would forbid to swap that."""
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView))


def slots(module: nn.Module) -> list[Slot]:
    """Returns the parameters and persistent buffers of `module`, tied ones once, with all their names."""
    found: dict[int, Slot] = {}
    for name, tensor, is_param in _stateful(module):
        slot = found.setdefault(id(tensor), Slot([], tensor, is_param))
        if name not in slot.names:
            slot.names.append(name)
    return list(found.values())


def _stateful(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    for prefix, child in module.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, tensor in child._parameters.items():
            if tensor is not None:
                yield from ((part, inner, inner is tensor) for part, inner in parts(dot + name, tensor))
        for name, tensor in child._buffers.items():
            if tensor is not None and name not in child._non_persistent_buffers_set:
                yield from ((part, inner, False) for part, inner in parts(dot + name, tensor))


def check_kinds(module: nn.Module, found: list[Slot], device: Device, dtype: object) -> None:
    """Refuses tensors with operators of their own, but for those that consist of plain ones, on the CPU and as stored.

    Raises:
        LitrtError: That names the first.
    """
    for slot in found:
        kind = type(slot.tensor)
        if kind not in (Deferred, torch.Tensor, nn.Parameter):
            raise LitrtError(
                f"cannot serve {slot.names[0]!r}: it is a {kind.__name__}, a kind of tensor with operators of its own. "
                "Make it after litrt.Runtime, from the weight in rt.module."
            )
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_wrapper(tensor) and (device.torch_device.type != "cpu" or dtype is not None):
            raise LitrtError(
                f"cannot serve {name!r} {'in another dtype' if dtype is not None else f'on {device.torch_device}'}: "
                f"it is a {type(tensor).__name__}, which consists of other tensors. Those are served as they are "
                "stored, on the CPU."
            )


def tables(module: nn.Module, found: list[Slot]) -> list[str]:
    """Returns the stored names of weights of which rows are used: of embeddings, and stacks of matrices."""
    rows = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    whole = {id(child.weight) for child in module.modules() if isinstance(child, nn.modules.conv._ConvNd)}
    return [
        slot.stored
        for slot in found
        if slot.shape and slot.shape[0] > 1
        if id(slot.tensor) in rows or (slot.is_param and len(slot.shape) > 2 and id(slot.tensor) not in whole)
    ]


def match(module: nn.Module, found: list[Slot], store: Store) -> None:
    """Finds every slot's tensor in `store`; of a tied one, any of its names will do.

    Raises:
        SkeletonError: With all the names that are missing, unexpected or of another shape.
    """
    missing: list[str] = []
    misshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    known: set[str] = set()
    for slot in found:
        known.update(slot.names)
        stored = next((name for name in slot.names if name in store), None)
        if stored is None:
            missing.append(slot.names[0])
        elif store[stored].shape != slot.shape:
            misshaped[stored] = (slot.shape, store[stored].shape)
        else:
            slot.stored = store.resolve(stored)
    unexpected = [name for name in store if name not in known and not _is_ignorable(module, name)]
    if not (missing or misshaped or unexpected):
        return
    lines = [f"{store.path} does not fit the model:"]
    lines += _listed("missing in the store", missing)
    lines += _listed("unexpected, not in the model", unexpected)
    shapes = [f"{name} is {theirs} in the store and {ours} in the model" for name, (ours, theirs) in misshaped.items()]
    lines += _listed("of another shape", shapes)
    lines.append("Give the constructor that the checkpoint was made with, or convert the checkpoint that fits.")
    raise SkeletonError("\n".join(lines), missing=tuple(missing), unexpected=tuple(unexpected), misshaped=misshaped)


def _is_ignorable(module: nn.Module, name: str) -> bool:
    """Says whether a stored tensor is one that the constructor makes anyway, or that the model says it can do without.

    Old checkpoints carry causal masks, position ids and rotary tables, which are non-persistent buffers by now.
    """
    prefix, _, leaf = name.rpartition(".")
    try:
        owner = module.get_submodule(prefix)
    except AttributeError:
        owner = None
    if owner is not None and leaf in owner._non_persistent_buffers_set:
        return True
    patterns = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def _listed(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    rest = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return [f"  {what} ({len(names)}): {', '.join(names[:_MAX_NAMES])}{rest}"]


def furnish(
    module: nn.Module,
    found: list[Slot],
    deferral: Deferral,
    infos: dict[str, TensorInfo],
    source: Source,
    indices: dict[str, int],
    device: Device,
) -> dict[int, list[Placeholder]]:
    """Puts placeholders in the place of all weights, and values in the place of everything else that was deferred.

    Returns:
        The placeholder objects of each segment.
    """
    for child in module.modules():
        if isinstance(child, nn.RNNBase):
            # Weak references would forbid a swap. Their only use is to notice parameters that were exchanged.
            child._flat_weight_refs = [None] * len(child._flat_weights_names)
    weights = {id(slot.tensor) for slot in found}
    others = [tensor for tensor in deferral.living() if id(tensor) not in weights]
    placed: dict[int, list[Placeholder]] = {}
    of_buffer: dict[int, tuple[Slot, int]] = {}
    for slot in found:
        info, index = infos[slot.stored], indices[slot.stored]
        ref = deferral.ref(slot.tensor)
        if ref is not None:
            of_buffer[id(ref.buffer)] = (slot, index)
        meta = torch.empty(info.shape, dtype=info.dtype, device="meta")
        placeholder = Placeholder(
            source,
            index,
            slot.stored,
            meta,
            info.shape,
            device.torch_device,
            is_param=slot.is_param,
            requires_grad=slot.tensor.requires_grad,
        )
        _put(slot.tensor, placeholder, slot.names[0])
        assert isinstance(slot.tensor, Placeholder)
        placed.setdefault(index, []).append(slot.tensor)
        del placeholder

    # Buffers that are not stored, and tensors that the constructor kept anywhere else.
    values: list[Deferred] = []
    for tensor in others:
        ref = deferral.ref(tensor)
        if ref is None or id(ref.buffer) not in of_buffer:
            values.append(tensor)
            continue
        slot, index = of_buffer[id(ref.buffer)]
        # A view of a weight: of the stored one, as it would be after loading in place.
        info = infos[slot.stored]
        meta = torch.empty(info.shape, dtype=info.dtype, device="meta").as_strided(ref.size, ref.stride, ref.offset)
        is_param = isinstance(tensor, nn.Parameter)
        view = Placeholder(source, index, slot.stored, meta, info.shape, device.torch_device, is_param=is_param)
        _put(tensor, view, slot.names[0])
    # As `module.to(device)` does: other tensors stay where they are.
    moved = {id(buffer) for buffer in module.buffers()}
    for tensor, real in zip(values, deferral.materialize(values), strict=True):
        if id(tensor) in moved:
            real = real.to(device.torch_device)
        if isinstance(tensor, nn.Parameter):
            real = nn.Parameter(real, requires_grad=tensor.requires_grad)
        _put(tensor, real, "a tensor of the constructor")
    return placed


def _put(old: torch.Tensor, new: torch.Tensor, name: str) -> None:
    """Makes the object `old` be what `new` is, for everybody who refers to it."""
    for key, value in vars(old).items():
        if not key.startswith("_litrt_") and key != "_is_param":
            vars(new).setdefault(key, value)
    try:
        torch.utils.swap_tensors(old, new)  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise LitrtError(
            f"cannot serve {name!r}: its constructor holds it in a way that litrt cannot follow ({error})."
        ) from error
