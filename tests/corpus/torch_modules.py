"""torch.nn's own modules, each between two layers that stream."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import nn

from corpus.case import Case, Inputs, NotBuilt, outputs, seeded

WIDTH = 8

_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "kernel_size": (3, (3, 2)),
    "num_embeddings": (20,),
    "num_heads": (2,),
    "nhead": (2,),
    "dim_feedforward": (16,),
    "num_groups": (2,),
    "upscale_factor": (2,),
    "downscale_factor": (2,),
    "output_size": (2, (4, 4)),
    "output_ratio": ((0.5, 0.5),),
    "padding": (1, (1, 1)),
    "normalized_shape": (WIDTH,),
    "cutoffs": ([4, 6],),
    "n_classes": (WIDTH,),
    "scale_factor": (2,),
    "num_layers": (2,),
    "dim": (1,),
    "unflattened_size": ((2, 4),),
    "lower": (0.1,),
    "upper": (0.3,),
    "min_val": (-1.0,),
    "max_val": (1.0,),
    "threshold": (0.1,),
    "value": (0.5,),
    "proj_size": (0,),
    "size": (4,),
    "output_padding": (0,),
}


def classes() -> list[str]:
    """Returns the names of the modules of torch.nn."""
    return sorted(
        name
        for name, value in vars(nn).items()
        if isinstance(value, type) and issubclass(value, nn.Module) and value is not nn.Module
    )


def case_of(name: str) -> Case:
    """Returns a module as a case.

    Raises:
        NotBuilt: If no arguments or no inputs are found with which it runs.
    """
    kind = getattr(nn, name)
    if name.startswith("Lazy"):
        raise NotBuilt(
            "a lazy module has no weights before its first pass: give every size to the one that is not lazy"
        )
    if kind.forward is nn.Module.forward:
        raise NotBuilt("a container without a forward of its own")
    reasons = ["no arguments are found with which it is made"]
    for construct in _constructors(kind):
        try:
            with seeded():
                module = construct().eval()
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        for shapes in _SHAPES:
            if _runs(module, shapes):
                build = functools.partial(_Between, construct)
                return Case(name, "torch.nn", build, functools.partial(_inputs, shapes))
        reasons.append("no inputs are found with which it runs")
    raise NotBuilt(reasons[-1])


def _constructors(kind: type[nn.Module]) -> Iterator[Callable[[], nn.Module]]:
    if issubclass(kind, nn.TransformerEncoder | nn.TransformerDecoder):
        layer = nn.TransformerEncoderLayer if issubclass(kind, nn.TransformerEncoder) else nn.TransformerDecoderLayer
        yield lambda: kind(layer(WIDTH, 2, 16, batch_first=True), 2)
        return
    if kind is nn.Sequential:
        yield lambda: kind(nn.Linear(WIDTH, WIDTH), nn.ReLU())
        return
    wanted = []
    for parameter in list(inspect.signature(kind.__init__).parameters.values())[1:]:
        required = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if required or (
            parameter.name in ("d_model", "nhead", "dim_feedforward", "scale_factor", "size")
            and kind is not nn.LPPool2d
        ):
            if parameter.name == "size" and not required:
                continue
            wanted.append((parameter.name, _ARGUMENTS.get(parameter.name, (WIDTH,))))
        elif parameter.name == "batch_first":
            wanted.append((parameter.name, (True,)))
    if not wanted and "args" in inspect.signature(kind.__init__).parameters:
        # A recurrent module says nothing in its signature.
        yield lambda: kind(WIDTH, WIDTH, num_layers=2, batch_first=True)
    for values in product(*(values for _, values in wanted)):
        yield functools.partial(kind, **dict(zip((name for name, _ in wanted), values, strict=True)))


class _Between(nn.Module):
    """A module between two layers; what its inputs lack in dimensions, the first layer does not care about."""

    def __init__(self, construct: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.before = nn.Linear(WIDTH, WIDTH)
        self.inner = construct()
        self.after = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, others: list[torch.Tensor]) -> list[torch.Tensor]:
        first = self.before(x).sigmoid() if x.is_floating_point() else x  # some losses take shares
        y = outputs(self.inner(first, *others))
        floating = x if x.is_floating_point() else torch.nn.functional.one_hot(x % WIDTH, WIDTH).float()
        return [*y, self.after(floating)]


def _floats(*shape: int) -> tuple[str, tuple[int, ...]]:
    return "float", shape


def _ids(*shape: int) -> tuple[str, tuple[int, ...]]:
    return "ids", shape


_SHAPES: tuple[tuple[tuple[str, tuple[int, ...]], ...], ...] = (
    (_floats(5, WIDTH),),
    (_floats(WIDTH, WIDTH),),
    (_floats(WIDTH, WIDTH, WIDTH),),
    (_floats(WIDTH, WIDTH, WIDTH, WIDTH),),
    (_floats(WIDTH, WIDTH, 4, 4, WIDTH),),
    (_ids(5),),
    (_ids(4, 4),),
    (_floats(5, WIDTH), _floats(5, WIDTH)),
    (_floats(3, 5, WIDTH),) * 2,
    (_floats(3, 5, WIDTH),) * 3,
    (_floats(5, WIDTH),) * 3,
    (_floats(5, WIDTH), _ids(5)),
    (_floats(5, WIDTH), _ids(5, WIDTH)),
    (_floats(5, WIDTH), _floats(5)),
    (_floats(5, WIDTH), _floats(5, WIDTH), _ids(5)),
    (_floats(5, WIDTH), _floats(5, WIDTH), _floats(5)),
)


def _tensors(shapes: tuple[tuple[str, tuple[int, ...]], ...], number: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1 + number)
    made = []
    for kind, shape in shapes:
        shape = (shape[0] + number, *shape[1:])
        made.append(
            torch.rand(shape, generator=generator) if kind == "float" else torch.randint(2, shape, generator=generator)
        )
    return made


def _inputs(shapes: tuple[tuple[str, tuple[int, ...]], ...], number: int) -> Inputs:
    x, *others = _tensors(shapes, number)
    return {"x": x, "others": others}


def _runs(module: nn.Module, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> bool:
    try:
        with torch.no_grad(), seeded():
            for number in (0, 1):
                x, *others = _tensors(shapes, number)
                made = outputs(module(x, *others))
    except Exception:
        return False
    return bool(made)
