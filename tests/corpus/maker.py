"""What makers of inputs share: the model, its config, the hints, and what was made before."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from corpus.case import Inputs
from corpus.hints import Hints
from corpus.shrink import FIRST_WORD, N_WORDS, is_config


def find(config: Any, *names: str, default: Any = None) -> Any:
    """Returns the first of the names that a config has, or one of its parts, from the outside in."""
    level = [config]
    while level:
        for part in level:
            for name in names:
                try:
                    value = getattr(part, name, None)
                except RuntimeError:
                    continue  # it is another one in each layer
                if value is not None:
                    return value
        level = [value for part in level for value in vars(part).values() if is_config(value)]
    return default


def side(value: Any) -> tuple[int, int]:
    """Returns height and width, from a size as configs write it."""
    if isinstance(value, dict):
        value = [value.get("height", 32), value.get("width", 32)]
    return (value, value) if isinstance(value, int) else (int(value[-2]), int(value[-1]))


class Maker:
    """Makes the arguments of one call."""

    def __init__(self, model: nn.Module, hints: Hints) -> None:
        self.config: Any = model.config
        self.hints = hints
        self.model = model
        self.given: Inputs = {}
        self.parameters = inspect.signature(model.forward).parameters
        self.generator = torch.Generator().manual_seed(1 + hints.n_sequences)

    def has(self, *names: str) -> bool:
        """Says whether the model takes one of the arguments."""
        return any(name in self.parameters and name not in self.hints.without for name in names)

    def noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def words(self, n_tokens: int | None = None, n_sequences: int | None = None) -> torch.Tensor:
        low = min(FIRST_WORD, max(find(self.config, "vocab_size", default=FIRST_WORD + N_WORDS) - N_WORDS, 2))
        high = min(FIRST_WORD + N_WORDS, find(self.config, "vocab_size", default=FIRST_WORD + N_WORDS))
        return torch.randint(
            low, max(high, low + 1), (n_sequences or self.n, n_tokens or self.hints.n_tokens), generator=self.generator
        )

    @property
    def n(self) -> int:
        return self.hints.n_sequences

    @property
    def width(self) -> int:
        """Of the hidden states."""
        return int(find(self.config, "hidden_size", "d_model", default=32))


Make = Callable[[Maker], Any]
