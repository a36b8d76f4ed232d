"""What a model of the corpus is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Inputs = dict[str, Any]


class NotBuilt(Exception):
    """A model that cannot be made small, or does not run as the plain model: there is nothing to compare with."""


@dataclass(frozen=True, eq=False)
class Case:
    """A model, small enough to run whole, and inputs.

    Attributes:
        name: The model type, or the class.
        family: Of which package, and which inputs it takes, for reports.
        construct: Builds the model as a user would: random weights, no seed, in training mode.
        inputs: Makes the keyword arguments of a forward, the same at every call: of the first input, or the second one,
            which has another batch size and length where the model takes another.
        method: What is called.
    """

    name: str
    family: str
    construct: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    method: str = "__call__"

    def build(self) -> nn.Module:
        """Constructs the model in evaluation mode, with the same weights at every call."""
        with seeded():
            return self.construct().eval()

    def call(self, module: nn.Module, number: int = 0) -> list[torch.Tensor]:
        """Runs a pass on an input and returns its outputs; what is random in it repeats."""
        with seeded():
            return outputs(getattr(module, self.method)(**self.inputs(number)))


@contextlib.contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Makes what is random inside the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def outputs(y: object) -> list[torch.Tensor]:
    """Lists the tensors in what a model returns, in order.

    Key-value caches and recurrent states are left out: they are objects of many classes, and the logits
    already depend on what they hold.
    """
    if isinstance(y, torch.Tensor):
        return [y]
    if isinstance(y, Mapping):
        y = tuple(y.values())
    if isinstance(y, tuple | list):
        return [tensor for part in y for tensor in outputs(part)]
    return []
