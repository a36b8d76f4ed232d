"""The shape of the package: what may import what, how long a file may be, and what the root exports."""

from __future__ import annotations

import ast
import builtins
import functools
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import litrt
from litrt import errors

PACKAGE = Path(litrt.__file__).parent
MODULES = {path.stem: path for path in sorted(PACKAGE.glob("*.py"))}

LAYERS: dict[str, tuple[str, ...]] = {
    "base": ("errors", "units", "documents", "progress", "patience"),
    "pure": (
        "trace",
        "stats",
        "cursor",
        "log",
        "bound",
        "policy",
        "schedule",
        "tables",
        "layout",
        "residency",
        "plan",
        "measured",
        "paths",
    ),
    "edges": (
        "wrappers",
        "blocks",
        "crc",
        "arrays",
        "bounded",
        "zips",
        "links",
        "tensors",
        "checked",
        "store",
        "directio",
        "packed",
        "reader",
        "blockreads",
        "source",
        "safetensors_file",
        "raw_files",
        "lit_folder",
        "gguf_file",
        "zarr_source",
        "torch_file",
        "checkpoint",
        "memory",
        "device",
        "cuda",
        "devices",
        "operators",
        "views",
        "rowops",
        "deferred",
        "budget",
        "gather",
        "ranges",
        "loader",
        "reads",
        "tune",
        "compression",
        "verify",
        "staging",
        "convert",
        "repair",
        "lazy",
        "export",
    ),
    "moving": ("arena", "cache", "turns", "bindings", "parts", "follower", "pipeline", "link"),
    "model": (
        "rows",
        "compiled",
        "gradients",
        "borrow",
        "placeholder",
        "frames",
        "guards",
        "onlookers",
        "residents",
        "skeleton",
    ),
    "wiring": ("passes", "serving", "planner", "shared", "runtime"),
    "top": ("testing", "demo", "cli", "__init__"),
}
"""Every module, lowest first: each imports only what stands before it, in its own layer or below."""

ORDER = [module for layer in LAYERS.values() for module in layer]

PURE = {
    "trace",
    "tables",
    "bound",
    "layout",
    "schedule",
    "residency",
    "plan",
    "measured",
    "paths",
    "policy",
    "cursor",
    "units",
    "stats",
    "log",
}
FORBIDDEN_IN_PURE = {"torch", "zarr", "threading", "time", "concurrent", "asyncio", "multiprocessing"}


def imported(path: Path) -> set[str]:
    """Returns the full names of the modules that a file imports, wherever in the file it does."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = node.module or ""
            if node.level:
                parent = "litrt" + (f".{parent}" if parent else "")
            found.add(parent)
            if parent == "litrt":
                found.remove(parent)
                found.update(f"litrt.{alias.name}" if alias.name in MODULES else "litrt" for alias in node.names)
    return found


@functools.cache
def graph() -> dict[str, set[str]]:
    """Returns for every module of litrt those of litrt that it imports."""
    found = {}
    for module, path in MODULES.items():
        names = {name for name in imported(path) if name.split(".")[0] == "litrt"}
        found[module] = {name.split(".")[1] if "." in name else "__init__" for name in names}
    return found


def test_every_module_has_its_layer() -> None:
    assert sorted(ORDER) == sorted(MODULES)
    assert len(set(ORDER)) == len(ORDER)


def test_imports_make_no_circle() -> None:
    assert len(list(TopologicalSorter(graph()).static_order())) == len(MODULES)


def test_the_graph_is_not_empty() -> None:
    assert "plan" in graph()["runtime"]
    assert {"bound", "layout", "policy", "residency", "schedule", "trace", "units"} <= graph()["plan"]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_downward(module: str) -> None:
    below = set(ORDER[: ORDER.index(module)])
    assert graph()[module] - below == set()


@pytest.mark.parametrize("module", sorted(PURE))
def test_what_decides_touches_neither_torch_nor_zarr_nor_threads_nor_clocks(module: str) -> None:
    reached = {module}
    while more := {other for name in reached for other in graph()[name]} - reached:
        reached |= more
    assert reached <= PURE | {"errors"}
    for name in reached:
        assert {found.split(".")[0] for found in imported(MODULES[name])} & FORBIDDEN_IN_PURE == set()


def test_all_exports_are_sorted_and_there() -> None:
    assert litrt.__all__ == sorted(litrt.__all__)
    assert len(set(litrt.__all__)) == len(litrt.__all__)
    for name in litrt.__all__:
        assert hasattr(litrt, name)


def test_all_that_the_root_imports_is_exported() -> None:
    tree = ast.parse(MODULES["__init__"].read_text())
    names = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert names == set(litrt.__all__)


def error_classes() -> dict[str, type[BaseException]]:
    return {
        name: found
        for name, found in vars(errors).items()
        if isinstance(found, type) and issubclass(found, BaseException) and found.__module__ == errors.__name__
    }


def drawn_tree() -> dict[str, tuple[str | None, str | None]]:
    """Returns for every error of the drawing what it hangs from, and the builtin in parentheses behind its name."""
    assert errors.__doc__ is not None
    drawn: dict[str, tuple[str | None, str | None]] = {}
    above: dict[int, str] = {}
    for line in errors.__doc__.splitlines():
        match = re.match(r"    ((?:[│ ]   )*)(├── |└── )?(\w+Error)(?:\((\w+)\))?(?:\s|$)", line)
        if match is None:
            continue
        depth = len(match[1]) // 4 + (match[2] is not None)
        above[depth] = match[3]
        drawn[match[3]] = (above[depth - 1] if depth else None, match[4])
    return drawn


def test_the_errors_are_those_of_the_drawing() -> None:
    real = {}
    for name, found in error_classes().items():
        bases = [base.__name__ for base in found.__bases__]
        own = [base for base in bases if base in error_classes()]
        guessed = [base for base in bases if base not in error_classes() and base != "Exception"]
        assert len(own) <= 1
        assert len(guessed) <= 1
        real[name] = (own[0] if own else None, guessed[0] if guessed else None)
    assert drawn_tree() == real
    assert len(real) == 12


def test_every_error_derives_from_a_builtin_that_a_caller_would_guess() -> None:
    for name, (_, guessed) in drawn_tree().items():
        assert issubclass(error_classes()[name], errors.LitrtError)
        if guessed is not None:
            assert issubclass(error_classes()[name], getattr(builtins, guessed))


def test_every_error_is_exported() -> None:
    assert set(error_classes()) <= set(litrt.__all__)
