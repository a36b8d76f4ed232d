"""What is promised of a model that the runtime serves."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import litrt
from corpus.case import Case, NotBuilt
from litrt.testing import FakeDevice

N_PASSES = 3
MOST_PASSES = 6
"""Some modules keep what they make of their weights in a first pass: of these, others are the steady ones."""


@dataclass(frozen=True)
class Served:
    """How a model was served.

    Attributes:
        weight_bytes: Of all its weights.
        streamed: For each device and budget, the budget in bytes and what a steady pass reads.
    """

    weight_bytes: int
    streamed: dict[str, tuple[int, int]]


def perturbed(module: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the state of `module`, no two of its floating tensors equal; what is tied stays tied."""
    generator = torch.Generator().manual_seed(2)
    done: dict[tuple[Any, ...], torch.Tensor] = {}
    state = {}
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue  # extra state, which is the constructor's
        key = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        if key not in done:
            values = tensor.clone()
            if tensor.is_floating_point() or tensor.is_complex():
                noise = 0.02 * torch.randn(tensor.shape, generator=generator)
                exact = torch.complex128 if tensor.is_complex() else torch.float64
                values = (values.to(exact) + noise.abs()).to(tensor.dtype)  # variances and the like stay positive
            done[key] = values
        state[name] = done[key]
    return state


def is_same(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> bool:
    """Says whether tensors are the same, bit for bit but for what is no number."""
    return len(got) == len(wanted) and all(
        (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)
        and (torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))
        for a, b in zip(got, wanted, strict=True)
    )


def assert_same(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], what: str) -> None:
    """Asserts that outputs are those of the plain model."""
    if not is_same(got, wanted):
        shapes = [[tuple(t.shape) for t in tensors] for tensors in (got, wanted)]
        raise AssertionError(f"{what}: other outputs than the plain model's, {shapes[0]} and {shapes[1]}")


@torch.no_grad()
def plain_of(case: Case) -> tuple[nn.Module, list[list[torch.Tensor]]]:
    """Returns the plain model, and what it gives for the two inputs.

    Raises:
        NotBuilt: If there is nothing in it to compare with.
    """
    before = case.call(case.build(), 0)
    plain = case.build()  # another one: some modules keep what they made of their weights in the first pass
    plain.load_state_dict(perturbed(plain), strict=False)
    expected = [case.call(plain, number) for number in (0, 1)]
    if not is_same(case.call(plain, 0), expected[0]):
        raise NotBuilt("the plain model does not repeat itself")
    if is_same(before, expected[0]):
        raise NotBuilt("what it returns does not depend on its weights")
    if not any(y.isfinite().any() for y in expected[0]):
        raise NotBuilt("what the plain model returns is not finite")
    return plain, expected


def check(case: Case, path: Path, devices: Sequence[str] = ("cpu", "fake")) -> Served:
    """Serves a model on the CPU and on a double of a device, at two budgets, and asserts all that is promised.

    Raises:
        NotBuilt: If there is nothing to compare with.
        AssertionError: If a promise is broken.
        litrt.LitrtError: If the model is not served.
    """
    plain, expected = plain_of(case)
    weights = {name: value for name, value in plain.state_dict().items() if isinstance(value, torch.Tensor)}
    litrt.convert(weights, path, progress=False)
    streamed = {}
    total_bytes = 0
    for device in devices:
        for budget in ("min", "50%"):
            total_bytes, budget_bytes, moved_bytes = _serve(case, path, expected, device, budget)
            streamed[f"{device} {budget}"] = (budget_bytes, moved_bytes)
    return Served(total_bytes, streamed)


def warmed(
    construct: Callable[[], nn.Module], path: Path, budget: str | int, call: Callable[[nn.Module], Any], **options: Any
) -> tuple[litrt.Runtime, Any]:
    """Returns a runtime, and what its first pass gave; at the smallest workable budget where `budget` is below it."""
    for _ in range(8):
        rt = None
        try:
            rt = litrt.Runtime(construct, path, budget=budget, **options)
            return rt, call(rt.module)
        except BaseException as error:
            if rt is not None:
                rt.close()
            if not isinstance(error, litrt.BudgetError) or error.budget_bytes is None or error.needed_bytes is None:
                raise
            if error.needed_bytes <= error.budget_bytes:
                raise
            budget = error.needed_bytes
    raise AssertionError(f"the smallest workable budget is said to be {budget}, and is not")


@torch.no_grad()
def _serve(
    case: Case, path: Path, expected: list[list[torch.Tensor]], device_name: str, budget: str
) -> tuple[int, int, int]:
    where = f"{device_name}, budget {budget}"
    fake = FakeDevice("random", seed=zlib.crc32(case.name.encode())) if device_name == "fake" else None
    options = {"device": fake} if fake is not None else {}
    rt, _ = warmed(case.build, path, budget, lambda module: case.call(module, 0), **options)
    with rt, fake.watching() if fake is not None else nullcontext():
        wrong: list[str] = []
        n_steady = 0
        for number in range(MOST_PASSES):
            before, gathered_before = rt.stats(), rt._pipeline.count().gathered_bytes
            y = case.call(rt.module, 0)
            counted = rt.stats().since(before)
            assert_same(y, expected[0], f"{where}, pass {number}")
            moved_bytes = counted.read_bytes if fake is None else counted.link_bytes
            # Rows that are there still since the last pass are not gathered again.
            gathered_bytes = rt._pipeline.count().gathered_bytes - gathered_before
            there_bytes = rt.plan.gathered_bytes - gathered_bytes
            if counted.n_faults or there_bytes < 0 or moved_bytes + there_bytes != rt.plan.streamed_bytes:
                n_steady = 0
                wrong.append(
                    f"pass {number}: {counted.n_faults} faults, {moved_bytes} bytes moved, {there_bytes} there before, "
                    f"{rt.plan.streamed_bytes} planned"
                )
                continue
            n_steady += 1
            if number >= N_PASSES - 1 and n_steady >= 2:
                break
        else:
            raise AssertionError(f"{where}: {'; '.join(wrong)}")
        planned_bytes = rt.plan.streamed_bytes
        for number in (1, 1, 0):
            assert_same(case.call(rt.module, number), expected[number], f"{where}, another input ({number})")
        stats = rt.stats()
        assert stats.peak_bytes <= stats.budget_bytes, where
        assert stats.read_bytes > 0, where
        if stats.budget_bytes < rt.trace.used_bytes:
            assert planned_bytes > 0, f"{where}: nothing streams"
        return rt.total_bytes, stats.budget_bytes, planned_bytes
