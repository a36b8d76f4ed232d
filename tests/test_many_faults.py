"""Each kind of fault at a hundred random places: one error that names it, no wrong result, and none after it."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeStore
from test_faults import N_LAYERS, Layers, constructor, damage, expected, run_passes, truncate, vector

import litrt
from litrt.staging import exchange
from litrt.testing import FakeDevice

pytestmark = pytest.mark.usefixtures("poisoned")

N_PLACES = 100


@contextlib.contextmanager
def put(file: Path, how: Callable[[Path], object]) -> Iterator[None]:
    """Puts a file in the place of another in one step, as it may be read at any moment, and undoes it."""
    twin = file.with_name("twin")
    shutil.copy2(file, twin)
    how(twin)
    if twin.exists() or twin.is_symlink():
        exchange(twin, file)
    else:
        file.rename(twin)
    yield
    if file.is_symlink() or file.exists():
        exchange(twin, file)
        shutil.rmtree(twin) if twin.is_dir() and not twin.is_symlink() else twin.unlink()
    else:
        twin.rename(file)


@contextlib.contextmanager
def refused(file: Path, what: str, number: int) -> Iterator[None]:
    """Makes every call of a function fail that is for a file."""
    real = getattr(os, what)

    def failing(first: Any, *rest: Any, **options: Any) -> Any:
        path = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else first
        if os.fspath(path) == str(file):
            raise OSError(number, os.strerror(number))
        return real(first, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, what, failing)
        yield


@contextlib.contextmanager
def no_descriptors(file: Path) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def to_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def to_loop(file: Path) -> None:
    """Makes it a link to the file in whose place it will be."""
    name = next(other.name for other in file.parent.iterdir() if other != file)
    file.unlink()
    file.symlink_to(name)


def to_longer(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")


def of_another(file: Path) -> None:
    """Puts the chunk of another weight in its place, which is as large."""
    number = int(file.parts[-4].removeprefix("weights."))
    other = file.parents[3] / f"weights.{(number + 1) % N_LAYERS}" / Path(*file.parts[-3:-1]) / "0"
    file.write_bytes(other.read_bytes())


def of_another_store(file: Path) -> None:
    """Puts the chunk of another store in its place."""
    file.write_bytes((file.parents[4] / "other.zarr" / Path(*file.parts[-4:-1]) / "0").read_bytes())


Fault = Callable[[Path], AbstractContextManager[None]]

FAULTS: dict[str, tuple[str, Fault]] = {
    "truncated": ("has .* bytes in place of|is damaged: its checksum is", lambda file: put(file, truncate)),
    "flipped": ("is damaged: its checksum is", lambda file: put(file, damage)),
    "longer": ("has .* bytes in place of|is damaged: its checksum is", lambda file: put(file, to_longer)),
    "deleted": ("is missing", lambda file: put(file, Path.unlink)),
    "of another weight": ("is whole, but it is not what", lambda file: put(file, of_another)),
    "of another store": ("is whole, but it is not what", lambda file: put(file, of_another_store)),
    "a directory": (r"cannot be read \(|has .* bytes in place of", lambda file: put(file, to_directory)),
    "a loop of links": (r"cannot be read \(.*symbolic links", lambda file: put(file, to_loop)),
    "EIO": (r"cannot be read \(.*error\)\. Check the disk", lambda file: refused(file, "preadv", errno.EIO)),
    "EACCES": (r"cannot be read \(.*denied.*\)\. Make it readable", lambda file: refused(file, "open", errno.EACCES)),
    "no descriptors": (r"cannot be read \(.*open files.*\)\. This process has too many files open", no_descriptors),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_at_any_place_is_one_error_that_names_it(
    kind: str, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = random.Random(kind)
    # Read through the page cache, in one piece and in several, past it, and decoded; on the host, and for a device.
    whole_bytes = 32 << 20
    for width, chunk_bytes, compress, half in (
        (32, whole_bytes, None, "50%"),
        (32, 512, None, "50%"),
        (260, whole_bytes, None, "50%"),
        (260, whole_bytes, "zstd", 3_000_000),
    ):
        monkeypatch.setattr("litrt.arrays.TARGET_CHUNK_BYTES", chunk_bytes)
        result = expected(width)
        path = make_store(Layers(width), "served.zarr", compress=compress, overwrite=True)
        other = {name: 2 * value for name, value in Layers(width).state_dict().items()}
        make_store(other, "other.zarr", compress=compress, overwrite=True)
        runtimes: list[dict[str, Any]] = [
            {"budget": "min"},
            {"budget": half},
            {"budget": half, "policy": "lru"},
            {"budget": "min", "device": FakeDevice(), "host_budget": 0},
        ]
        for options in runtimes:
            with litrt.Runtime(constructor(width), path, **options) as rt:
                rt.warmup(vector(width))
                for _ in range(N_PLACES // 16 + 1):
                    fail_once(rt, path, vector(width), result, kind, chosen)


def fail_once(
    rt: litrt.Runtime, path: Path, x: torch.Tensor, result: torch.Tensor, kind: str, chosen: random.Random
) -> None:
    said, fault = FAULTS[kind]
    plan = rt.host_plan or rt.plan  # of what is read from the disk
    stored = [index for index, segment in enumerate(plan.segments) if not segment.is_slot]
    name = plan.segments[chosen.choice([index for index in stored if index not in plan.resident])].name
    file = chosen.choice(sorted(file for file in (path / name / "c").rglob("*") if file.is_file()))
    at = chosen.randrange(N_LAYERS)
    with contextlib.ExitStack() as faults:

        def before(number: int) -> None:
            if number == at:
                rt.module.before = lambda _: None
                faults.enter_context(fault(file))

        rt.module.before = before
        began_s = time.monotonic()
        with pytest.raises(litrt.CorruptWeightError, match=said) as caught:
            run_passes(rt, x, 3)
        assert time.monotonic() - began_s < 10
    if fault is not no_descriptors:
        assert caught.value.name == name
        assert caught.value.file == str(file)
    assert repr(caught.value.name) in str(caught.value)
    assert caught.value.file in str(caught.value)
    for _ in range(2):
        assert torch.equal(rt(x), result)


@pytest.mark.parametrize("compress", [None, "zstd"])
def test_a_store_that_is_replaced_is_noticed_by_who_serves_the_one_before(
    compress: str | None, make_store: MakeStore
) -> None:
    width = 260
    path = make_store(Layers(width), compress=compress)
    with litrt.Runtime(constructor(width), path, budget="min") as rt:
        rt.warmup(vector(width))
        assert torch.equal(rt(vector(width)), expected(width))
        changed = {name: value + 1 for name, value in Layers(width).state_dict().items()}
        make_store(changed, compress=compress, overwrite=True)
        for _ in range(2):
            with pytest.raises(litrt.StoreChangedError, match="If the store was replaced, open it again"):
                run_passes(rt, vector(width), 3)
        make_store(Layers(width), compress=compress, overwrite=True)
        for _ in range(3):
            assert torch.equal(rt(vector(width)), expected(width))
