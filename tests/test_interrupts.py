"""Interrupts, as Ctrl-C sends them, at any moment of what litrt does: what follows is right, and does not hang."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import litrt

N_MOMENTS = 60
"""Moments at which each thing is interrupted, drawn anew with another seed in every test."""

LIMIT_S = 20.0
WIDTH = 128


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(1024, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8))
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.table(tokens)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.attention(x, x, x, need_weights=False)[0] @ self.layers[0].weight


class Interrupts:
    """Raises KeyboardInterrupt at one of the moments at which Python looks for signals in code of litrt's.

    That is at the beginning of a function, and after a call of one that is not Python's.
    """

    def __init__(self) -> None:
        self.n_moments = 0
        self._at = -1

    def _look(self, frame: FrameType, event: str, _: Any) -> None:
        if event in ("call", "c_return") and frame.f_globals.get("__name__", "").startswith("litrt."):
            self.n_moments += 1
            if self.n_moments == self._at:
                sys.setprofile(None)
                raise KeyboardInterrupt

    def run(self, function: Callable[[], object], at: int) -> bool:
        """Runs a function, interrupted at moment number `at`; says whether it came to that."""
        self.n_moments, self._at = 0, at
        sys.setprofile(self._look)
        try:
            function()
        except KeyboardInterrupt:
            return True
        finally:
            sys.setprofile(None)
        return False


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("interrupts") / "model.zarr"
    litrt.convert(Model().state_dict(), path)
    return path


def in_a_thread(function: Callable[[], object]) -> object:
    """Returns what a function returns in a thread of its own, which has to end in time."""
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(LIMIT_S)
    assert not thread.is_alive(), "it hangs"
    assert results, "it has raised"
    return results[0]


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # a generator that is closed has moments too
@pytest.mark.parametrize("budget", ["min", "40%", "60%"])
@pytest.mark.parametrize("what", ["pass", "set_budget", "warmup", "use"])
def test_what_was_interrupted_anywhere_is_right_the_next_time(store: Path, what: str, budget: str) -> None:
    tokens = torch.randint(0, 1024, (2, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = Model().eval()(tokens)
    with litrt.Runtime(Model, store, budget=budget) as rt:
        others = ["70%", budget]

        def change() -> None:
            others.append(others.pop(0))
            rt.set_budget(others[0])

        doing: dict[str, Callable[[], object]] = {
            "pass": lambda: rt(tokens),
            "set_budget": change,
            "warmup": lambda: rt.warmup(tokens),
            "use": lambda: [layer.weight.sum() for layer in rt.module.layers],
        }
        rt.warmup(tokens)
        interrupts = Interrupts()
        interrupts.run(doing[what], -1)
        rng = random.Random(f"{what} {budget}")
        n_interrupted = 0
        for _ in range(N_MOMENTS):
            n_interrupted += interrupts.run(doing[what], rng.randrange(1, interrupts.n_moments + 1))
            for _ in range(2):
                assert torch.equal(in_a_thread(lambda: rt(tokens)), expected)  # type: ignore[arg-type]
            assert torch.equal(rt(tokens), expected)
            stats = rt.stats()
            assert stats.peak_bytes <= stats.budget_bytes
        assert n_interrupted > N_MOMENTS // 2
        rt.set_budget("min")
        assert torch.equal(rt(tokens), expected)
