"""Random models through random calls, interruptions and threads, each compared with the plain model.

Run as it is, a few examples, the same in every run. `pytest tests/test_statemachine.py --hypothesis-profile=many` looks
for new ones, 500 at a time, in about five minutes; `--hypothesis-seed=...` chooses which.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from conftest import poison, read_threads
from hypothesis import note, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

import litrt

WIDTH = 16
N_ROWS = 1500
"""Of a table: several blocks, of which rows are read."""


# Random models: cells, and a program that uses them and their weights.


class Table(nn.Module):
    def __init__(self, n_rows: int) -> None:
        super().__init__()
        self.rows = nn.Embedding(n_rows, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        numbers = (x.float().abs().sum(-1) * 97).long() % self.rows.num_embeddings
        return x + self.rows(numbers)


class Experts(nn.Module):
    """Matrices in one stack, of which each row of the input is sent to one."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.zeros(4, WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = (x.float().abs().sum(-1) * 97).long() % 4
        return torch.stack([row @ self.stack[number] for row, number in zip(x, chosen.tolist(), strict=True)])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.attend(x[None], x[None], x[None], need_weights=False)[0][0]
        return result


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.cell(x)[0]
        return result


CELLS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "no bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "wide": lambda: nn.Sequential(nn.Linear(WIDTH, 6 * WIDTH), nn.ReLU(), nn.Linear(6 * WIDTH, WIDTH)),
    "norm": lambda: nn.LayerNorm(WIDTH),
    "batch norm": lambda: nn.BatchNorm1d(WIDTH),
    "table": lambda: Table(24),
    "large table": lambda: Table(N_ROWS),
    "experts": Experts,
    "attention": Attention,
    "encoder": lambda: nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, batch_first=True),
    "recurrent": Recurrent,
}

OPS = ["call", "residual", "matrix", "sum of two", "held view", "row", "loop", "branch", "exit", "skip", "backwards"]


@dataclass(frozen=True)
class Spec:
    """A model: its cells, which of them are one module or have one matrix, and operations on two of them."""

    cells: tuple[str, ...]
    shared: tuple[tuple[int, int], ...]
    tied: tuple[tuple[int, int], ...]
    ops: tuple[tuple[str, int, int, int], ...]


class Graph(nn.Module):
    """A model made of a spec. `path` has a bit for every choice that a pass makes."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        cells = [CELLS[kind]() for kind in spec.cells]
        for one, other in spec.shared:
            cells[one % len(cells)] = cells[other % len(cells)]
        self.cells = nn.ModuleList(cells)
        self.matrix = nn.Parameter(torch.zeros(WIDTH, WIDTH))
        linear = [cell for cell in cells if isinstance(cell, nn.Linear)]
        for one, other in spec.tied if linear else ():
            linear[one % len(linear)].weight = linear[other % len(linear)].weight
        self.squares = [cell.weight for cell in linear] + [self.matrix]
        self.ops = spec.ops

    def forward(self, x: torch.Tensor, path: int = 0) -> torch.Tensor:
        for number, (op, one, other, n) in enumerate(self.ops):
            cell, second = self.cells[one % len(self.cells)], self.cells[other % len(self.cells)]
            square = self.squares[one % len(self.squares)]
            chosen = path >> (number % 4) & 1
            if op == "call" or (op == "skip" and chosen):
                x = cell(x)
            elif op == "residual":
                x = x + cell(x)
            elif op == "matrix":
                x = F.linear(x, square)
            elif op == "sum of two":
                x = x @ (square + self.squares[other % len(self.squares)])
            elif op == "held view":
                view = square.t()
                x = second(x) @ view
            elif op == "row":
                x = x + square[n % WIDTH]
            elif op == "loop":
                for _ in range(1 + (path + n) % 3):
                    x = torch.tanh(cell(x))
            elif op == "branch":
                x = cell(x) if chosen else second(x)
            elif op == "exit" and chosen:
                return x
            elif op == "backwards":
                cells = list(self.cells)[:3]
                for each in reversed(cells) if chosen else cells:
                    x = torch.tanh(each(x))
            x = torch.tanh(x)
        return x


numbers = st.integers(0, 11)
specs = st.builds(
    Spec,
    st.lists(st.sampled_from(sorted(CELLS)), min_size=2, max_size=6).map(tuple),
    st.lists(st.tuples(numbers, numbers), max_size=1).map(tuple),
    st.lists(st.tuples(numbers, numbers), max_size=1).map(tuple),
    st.lists(st.tuples(st.sampled_from(OPS), numbers, numbers, numbers), min_size=2, max_size=8).map(tuple),
)


def filled(module: nn.Module) -> nn.Module:
    """Gives `module` values that no two of its weights have in common."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator).abs() / 2)
    return module.eval()


# What is done with a model.


class Interrupted(Exception):
    pass


ERRORS = [Interrupted, KeyboardInterrupt, GeneratorExit]
CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "nothing": nullcontext,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@dataclass(frozen=True)
class Call:
    """A call of a model, or of one of its cells."""

    seed: int
    n: int
    path: int
    child: int | None
    context: str

    def __call__(self, module: nn.Module) -> torch.Tensor:
        x = torch.randn(self.n, WIDTH, generator=torch.Generator().manual_seed(self.seed))
        with torch.no_grad(), CONTEXTS[self.context]():
            if self.child is None:
                return module(x, self.path)
            return module.cells[self.child % len(module.cells)](x)


calls = st.builds(
    Call,
    st.integers(0, 3),
    st.integers(1, 4),
    st.integers(0, 15),
    st.none() | st.integers(0, 5),
    st.sampled_from(sorted(CONTEXTS)),
)
passes = calls.map(lambda call: Call(call.seed, call.n, call.path, None, call.context))


budgets: st.SearchStrategy[str | float] = st.sampled_from(["min", 0.0, 0.2, 0.5, 0.8, "1GB"])
"""Words, or the share of what lies between the smallest budget and all."""


@contextmanager
def broken(module: nn.Module, cell: int, after: int, error: type[BaseException]) -> Iterator[None]:
    """Makes a cell raise instead of running, once it has run `after` times."""
    n_calls = 0

    def count(*_: Any) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls > after:
            raise error

    handle = module.cells[cell % len(module.cells)].register_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()


class Machine(RuleBasedStateMachine):
    """A runtime and the plain model, which do the same."""

    def __init__(self) -> None:
        super().__init__()
        self.undo = pytest.MonkeyPatch()
        poison(self.undo)
        self.folder = tempfile.TemporaryDirectory()
        self.threads = read_threads()
        # Hypothesis times the cycle collector in Python, so that threads change places in the middle of torch's own
        # code, where a placeholder that becomes plain is no longer what torch has just found it to be.
        self.undo.setattr(gc, "callbacks", [])
        self.rt: litrt.Runtime | None = None

    @initialize(
        spec=specs,
        budget=budgets,
        policy=st.sampled_from(["belady", "belady", "lru"]),
        n_threads=st.integers(1, 2),
        compress=st.sampled_from([None, "lz4"]),
        chunk_bytes=st.sampled_from([32 << 20, 512]),
    )
    def open(
        self, spec: Spec, budget: str | float, policy: Any, n_threads: int, compress: str | None, chunk_bytes: int
    ) -> None:
        self.undo.setattr("litrt.arrays.TARGET_CHUNK_BYTES", chunk_bytes)
        self.plain = filled(Graph(spec))
        path = Path(self.folder.name) / "model.zarr"
        litrt.convert(self.plain.state_dict(), path, compress=compress, progress=False)
        construct = functools.partial(Graph, spec)
        self.smallest = self._smallest(construct, path, n_threads)
        self.whole = sum(tensor.nbytes for tensor in self.plain.state_dict().values())
        self.rt = litrt.Runtime(construct, path, budget=self._bytes(budget), policy=policy, n_threads=n_threads)

    def _bytes(self, budget: str | float) -> str | int:
        if isinstance(budget, str):
            return budget
        n_bytes = self.smallest + int(budget * max(self.whole - self.smallest, 0))
        note(f"budget {n_bytes}")
        return n_bytes

    def _smallest(self, construct: Callable[[], nn.Module], path: Path, n_threads: int) -> int:
        """Returns a budget that suffices on every path through the model, and for each of its cells.

        Views of matrices that a pass keeps until it ends are lazy where these stream. Of one that stays they are in the
        way of others: there is room for these as well.
        """
        with litrt.Runtime(construct, path, budget="min", n_threads=n_threads) as rt, torch.no_grad():
            x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
            for call in range(16):
                rt(x, call)
            for cell in rt.module.cells:
                cell(x)
            for weight in rt.module.parameters():
                weight.clone()
            for square in rt.module.squares:
                for other in rt.module.squares:
                    _ = square + other
            return rt.stats().budget_bytes + sum(square.nbytes for square in rt.module.squares)

    @rule(call=passes)
    def warm_up(self, call: Call) -> None:
        x = torch.randn(call.n, WIDTH, generator=torch.Generator().manual_seed(call.seed))
        self.rt.warmup(x, call.path)

    @rule(call=calls)
    def run(self, call: Call) -> None:
        self._compare(call)

    def _compare(self, call: Call) -> None:
        assert torch.equal(call(self.rt.module), call(self.plain))

    @rule(call=passes)
    def run_as_a_runtime(self, call: Call) -> None:
        x = torch.randn(call.n, WIDTH, generator=torch.Generator().manual_seed(call.seed))
        with torch.no_grad():
            assert torch.equal(self.rt(x, call.path), self.plain(x, call.path))

    @rule(call=calls, cell=numbers, after=st.integers(0, 2), error=st.sampled_from(ERRORS))
    def run_and_break_off(self, call: Call, cell: int, after: int, error: type[BaseException]) -> None:
        results = []
        for module in (self.plain, self.rt.module):
            with broken(module, cell, after, error):
                try:
                    results.append(call(module))
                except (Interrupted, KeyboardInterrupt, GeneratorExit) as raised:
                    results.append(type(raised))
        expected, actual = results
        assert type(expected) is type(actual)
        assert expected is actual if isinstance(expected, type) else torch.equal(expected, actual)

    @rule(
        work=st.lists(st.lists(calls, min_size=1, max_size=4), min_size=2, max_size=3),
        changes=st.lists(budgets, max_size=2),
    )
    def run_in_threads(self, work: list[list[Call]], changes: list[str | float]) -> None:
        expected = [[call(self.plain) for call in part] for part in work]

        # Then each can hold views that are in the way of the other: there is room, but in pieces.
        has_views = any(op == "held view" for op, *_ in self.plain.ops)

        def result(call: Call) -> torch.Tensor | None:
            with contextlib.suppress(*[litrt.BudgetError] * has_views):
                return call(self.rt.module)
            return None

        with ThreadPoolExecutor(len(work)) as pool:
            results = [pool.submit(lambda part: [result(call) for call in part], part) for part in work]
            for budget in changes:
                with contextlib.suppress(*[litrt.BudgetError] * has_views):
                    self.rt.set_budget(self._bytes(budget))
            actual = [result.result() for result in results]
        for got, wanted in zip(actual, expected, strict=True):
            assert all(a is None or torch.equal(a, b) for a, b in zip(got, wanted, strict=True))

    @rule(budget=budgets)
    def change_the_budget(self, budget: str | float) -> None:
        self.rt.set_budget(self._bytes(budget))

    @rule(budget=budgets, call=calls)
    def run_at_another_budget(self, budget: str | float, call: Call) -> None:
        with self.rt.at_budget(self._bytes(budget)):
            self._compare(call)
            self.the_budget_is_kept()

    @rule()
    def look_at_every_weight(self) -> None:
        for name, weight in self.plain.named_parameters():
            assert torch.equal(self.rt.module.get_parameter(name), weight)

    @rule(number=numbers)
    def read_a_matrix(self, number: int) -> None:
        square = self.rt.module.squares[number % len(self.rt.module.squares)]
        assert torch.equal(square.clone(), self.plain.squares[number % len(self.plain.squares)])

    @invariant()
    @precondition(lambda self: self.rt is not None)
    def the_budget_is_kept(self) -> None:
        stats = self.rt.stats()
        assert stats.peak_bytes <= stats.budget_bytes

    def teardown(self) -> None:
        try:
            if self.rt is not None:
                self.rt.close()
                assert read_threads() <= self.threads
        finally:
            self.folder.cleanup()
            self.undo.undo()


N_EXAMPLES = {"same": 30}
Machine.TestCase.settings = settings(
    max_examples=N_EXAMPLES.get(settings.get_current_profile_name(), settings().max_examples), stateful_step_count=15
)
TestMachine = Machine.TestCase
