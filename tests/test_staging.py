"""Conversions that were killed, interrupted, disturbed or met by another one."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import holds, write_gguf, write_lit, write_zarr
from safetensors.torch import save_file
from zarr.storage import ZipStore

import litrt
from litrt.compression import Measured
from litrt.convert import convert
from litrt.errors import StoreError
from litrt.reader import Reader
from litrt.staging import Staging, exchange, remove
from litrt.store import open_store

convert_module = importlib.import_module("litrt.convert")  # behind the function of that name
N_TENSORS = 24


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer.{n}": torch.randn(100 + 10 * n, 50, generator=generator) for n in range(N_TENSORS)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_file(weights(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def tree(root: Path) -> dict[str, bytes]:
    """Returns the content of every file under a directory."""
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def undisturbed(source: Path, tmp_path: Path, **options: Any) -> dict[str, bytes]:
    convert(source, tmp_path / "whole.zarr", progress=False, **options)
    return tree(tmp_path / "whole.zarr")


class Interruption:
    """Raises an error when a tensor is to be written, and counts those that are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.written: list[str] = []
        self.error: BaseException | None = None
        self.at = -1
        write = convert_module._write_tensor

        def write_or_fail(group: Any, source: Any, name: str, *args: Any) -> int:
            if self.error is not None and len(self.written) == self.at:
                raise self.error
            self.written.append(name)
            n_bytes: int = write(group, source, name, *args)
            return n_bytes

        monkeypatch.setattr(convert_module, "_write_tensor", write_or_fail)

    def fail(self, call: Callable[[], object], at: int, error: BaseException) -> None:
        """Calls a conversion that raises `error` at a tensor."""
        self.written.clear()
        self.at, self.error = at, error
        with pytest.raises(type(error)):
            call()
        self.written.clear()
        self.error = None


@pytest.fixture
def interruption(monkeypatch: pytest.MonkeyPatch) -> Interruption:
    return Interruption(monkeypatch)


# Killed.


def _convert(source: Path, store: Path, overwrite: bool) -> None:
    convert(source, store, overwrite=overwrite, progress=False)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_conversion_that_is_killed_at_any_moment_ends_as_if_it_had_not_been(
    source: Path, tmp_path: Path, overwrite: bool
) -> None:
    expected = undisturbed(source, tmp_path)
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["litrt"])
    target = tmp_path / "s.zarr"
    old: dict[str, bytes] = {}

    def run(kill_after_s: float | None) -> tuple[float, bool]:
        """Returns the seconds that a conversion took, and whether it ended by itself."""
        process = forks.Process(target=_convert, args=(source, target, overwrite))
        process.start()
        began_s = time.monotonic()
        process.join(kill_after_s)
        if process.exitcode is None:
            process.kill()
            process.join()
        return time.monotonic() - began_s, process.exitcode == 0

    def begin() -> None:
        shutil.rmtree(target, ignore_errors=True)
        if overwrite:
            convert({"old": torch.ones(3000)}, target, progress=False)
            old.update(tree(target))

    begin()
    run(None)
    begin()
    whole_s, ended = run(None)
    assert ended
    n_killed = 0
    while n_killed < 5:
        begin()
        while not (ended := run(random.uniform(0, whole_s))[1]):
            n_killed += 1
            if target.exists():
                assert tree(target) in (old, expected)
            else:
                assert not overwrite, "the old store is there until the new one is"
            if target.exists() and tree(target) == expected:
                break
        if not ended and (tmp_path / "s.zarr.partial").exists():
            # Killed after the store had its name: what is left is cleared by whoever converts next.
            convert(source, target, overwrite=True, progress=False)
        assert tree(target) == expected
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "s.zarr", "whole.zarr"]


# Gone on with.


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"compress": "zstd"}])
def test_an_interrupted_conversion_goes_on_where_it_stopped(
    source: Path, tmp_path: Path, interruption: Interruption, options: dict[str, Any]
) -> None:
    expected = undisturbed(source, tmp_path, **options)

    def call() -> litrt.Store:
        return convert(source, tmp_path / "s.zarr", progress=False, **options)

    interruption.fail(call, 10, KeyboardInterrupt())
    with pytest.raises(StoreError, match="is incomplete"):
        open_store(tmp_path / "s.zarr.partial")
    interruption.fail(call, 5, KeyboardInterrupt())
    call()
    assert interruption.written == [f"layer.{n}" for n in sorted(range(N_TENSORS), key=str)][15:]
    assert tree(tmp_path / "s.zarr") == expected
    assert not (tmp_path / "s.zarr.partial").exists()


def _write(kind: str, path: Path, made: dict[str, torch.Tensor]) -> Path:
    """Writes a checkpoint of a kind, and returns what to convert."""
    if kind == "lit":
        write_lit(path, made, "float32")
    elif kind == "gguf":
        path = path.with_suffix(".gguf")
        write_gguf(path, made)
    elif kind == "litrt":
        convert(made, path, progress=False)
    elif kind == "zarr":
        write_zarr(path, made)
    else:
        path = path.with_suffix(".zip")
        with ZipStore(path, mode="w") as store:
            write_zarr(store, made)
    return path


@pytest.mark.parametrize("kind", ["lit", "gguf", "litrt", "zarr", "zip"])
def test_every_source_of_files_is_gone_on_with_and_seen_to_change(
    kind: str, tmp_path: Path, interruption: Interruption
) -> None:
    made, others = ({f"layer.{n}": weights(seed)[f"layer.{n}"] for n in range(5)} for seed in (0, 1))
    source = _write(kind, tmp_path / "model", made)
    expected = undisturbed(source, tmp_path)

    def call() -> litrt.Store:
        return convert(source, tmp_path / "s.zarr", progress=False)

    interruption.fail(call, 3, KeyboardInterrupt())
    call()
    assert len(interruption.written) == 2
    assert tree(tmp_path / "s.zarr") == expected
    shutil.rmtree(tmp_path / "s.zarr")
    interruption.fail(call, 3, KeyboardInterrupt())
    shutil.rmtree(source) if source.is_dir() else source.unlink()
    _write(kind, tmp_path / "model", others)
    interruption.written.clear()
    store = call()
    assert len(interruption.written) == 5
    assert holds(store, others)


def test_another_key_map_begins_anew_though_it_makes_the_same_names(
    source: Path, tmp_path: Path, interruption: Interruption
) -> None:
    def call(*left_out: int) -> litrt.Store:
        kept = [f"layer.{n}" for n in range(N_TENSORS) if n not in left_out]
        key_map = {f"layer.{n}": None for n in left_out} | {name: f"w{n}" for n, name in enumerate(kept)}
        return convert(source, tmp_path / "s.zarr", key_map=key_map, progress=False)

    interruption.fail(lambda: call(0), 10, KeyboardInterrupt())
    store = call(1)
    assert len(interruption.written) == N_TENSORS - 1
    assert torch.equal(Reader(store).read_tensor("w0"), weights()["layer.0"])


def test_what_the_measured_compression_decided_is_kept(
    source: Path, tmp_path: Path, interruption: Interruption, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litrt.compression.SAMPLE_BYTES", 1000)
    probed = []

    def probe(samples: Any, itemsize: int, directory: Path) -> Any:
        probed.append(itemsize)
        return 1e6, [Measured("zstd", 2.0, 1e9, 1e8)]

    monkeypatch.setattr("litrt.compression.probe", probe)

    def call() -> litrt.Store:
        return convert(source, tmp_path / "s.zarr", compress="auto", progress=False)

    interruption.fail(call, 10, KeyboardInterrupt())
    store = call()
    assert probed == [4], "not measured again"
    assert store.compression is not None
    assert store.compression["dtypes"]["float32"]["disk_bps"] == 1e6
    assert store.compression["nbytes"] == store.total_bytes


def test_a_source_that_has_changed_is_read_from_the_start(
    source: Path, tmp_path: Path, interruption: Interruption
) -> None:
    interruption.fail(lambda: convert(source, tmp_path / "s.zarr", progress=False), 10, KeyboardInterrupt())
    save_file(weights(1), source)
    store = convert(source, tmp_path / "s.zarr", progress=False)
    assert len(interruption.written) == N_TENSORS
    reader = Reader(store)
    for name, tensor in weights(1).items():
        assert torch.equal(reader.read_tensor(name), tensor)


def test_other_options_begin_anew(source: Path, tmp_path: Path, interruption: Interruption) -> None:
    interruption.fail(lambda: convert(source, tmp_path / "s.zarr", progress=False), 10, KeyboardInterrupt())
    store = convert(source, tmp_path / "s.zarr", dtype="float16", progress=False)
    assert len(interruption.written) == N_TENSORS
    assert {info.dtype for info in store.values()} == {torch.float16}


def test_what_is_not_whole_after_all_is_written_again(source: Path, tmp_path: Path, interruption: Interruption) -> None:
    expected = undisturbed(source, tmp_path)
    interruption.fail(lambda: convert(source, tmp_path / "s.zarr", progress=False), 10, KeyboardInterrupt())
    partial = tmp_path / "s.zarr.partial"
    os.truncate(partial / "layer.0" / "c" / "0" / "0", 100)
    shutil.rmtree(partial / "layer.1")
    (partial / "layer.10" / "zarr.json").unlink()
    (partial / "zarr.json").write_text("{")
    with (partial / "(journal)").open("a") as journal:
        journal.write('{"name": "lay')
    convert(source, tmp_path / "s.zarr", progress=False)
    assert {"layer.0", "layer.1", "layer.10"} <= {*interruption.written}
    assert len(interruption.written) < N_TENSORS
    assert tree(tmp_path / "s.zarr") == expected


def test_values_of_a_mapping_are_never_taken_for_those_of_another(tmp_path: Path, interruption: Interruption) -> None:
    interruption.fail(lambda: convert(weights(), tmp_path / "s.zarr", progress=False), 10, KeyboardInterrupt())
    assert not list(tmp_path.iterdir())


# Errors.


def test_an_error_leaves_nothing(source: Path, tmp_path: Path, interruption: Interruption) -> None:
    full = OSError(28, "No space left on device")
    interruption.fail(lambda: convert(source, tmp_path / "s.zarr", progress=False), 10, full)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_is_there_needs_no_space_again_and_stays_until_there_is_enough(
    source: Path, tmp_path: Path, interruption: Interruption, monkeypatch: pytest.MonkeyPatch
) -> None:
    interruption.fail(lambda: convert(source, tmp_path / "s.zarr", progress=False), 20, KeyboardInterrupt())
    left_bytes = sum(tensor.nbytes for tensor in weights().values())
    left_bytes -= sum(weights()[name].nbytes for name in [f"layer.{n}" for n in sorted(range(N_TENSORS), key=str)][:20])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**12, free=left_bytes // 2))
    with pytest.raises(StoreError, match="free some"):
        convert(source, tmp_path / "s.zarr", progress=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**12, free=left_bytes))
    convert(source, tmp_path / "s.zarr", progress=False)
    assert len(interruption.written) == N_TENSORS - 20


# Others.


def test_two_conversions_to_one_destination_do_not_meet(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "s.zarr"
    with (
        Staging(target, None),
        pytest.raises(StoreError, match=r"s\.zarr is being written by another conversion: wait for it, or choose"),
    ):
        convert(source, target, progress=False)
    convert(source, target, progress=False)
    with Staging(target, None), pytest.raises(StoreError, match="another conversion"):
        convert(source, target, overwrite=True, progress=False)
    assert len(open_store(target)) == N_TENSORS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "s.zarr"]


def test_one_that_waited_sees_what_the_other_one_made(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other conversion ends after this one has looked whether there is a store, and before it has the lock."""
    target = tmp_path / "s.zarr"
    check = convert_module._total_bytes

    def meanwhile(*args: Any) -> Any:
        monkeypatch.undo()
        convert(source, target, progress=False)
        return check(*args)

    monkeypatch.setattr(convert_module, "_total_bytes", meanwhile)
    with pytest.raises(StoreError, match=r"s\.zarr exists"):
        convert(source, target, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "s.zarr"]


@pytest.mark.parametrize("kind", ["folder", "group", "link", "file", "link to nothing"])
def test_what_is_in_the_way_and_not_of_litrt_is_not_removed(kind: str, source: Path, tmp_path: Path) -> None:
    partial = tmp_path / "s.zarr.partial"
    if kind == "folder":
        partial.mkdir()
        (partial / "thesis.tex").write_text("x")
    elif kind == "group":
        write_zarr(partial, {"w": torch.ones(3)})
    elif kind == "file":
        partial.write_text("x")
    else:
        partial.symlink_to(tmp_path / "mine")
        if kind == "link":
            (tmp_path / "mine").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreError, match=r"s\.zarr\.partial is in the way and .*: move it, or choose another path"):
        convert(source, tmp_path / "s.zarr", progress=False)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_folder_is_not_in_the_way(source: Path, tmp_path: Path) -> None:
    (tmp_path / "s.zarr.partial").mkdir()
    assert len(convert(source, tmp_path / "s.zarr", progress=False)) == N_TENSORS


def test_a_folder_that_is_removed_while_it_is_looked_at_is_made(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir, failed = Path.mkdir, list[Path]()

    def removed_meanwhile(self: Path, *args: Any, **kwargs: Any) -> None:
        if self.name.endswith(".partial") and not failed:
            failed.append(self)
            raise FileExistsError(17, "File exists", str(self))
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", removed_meanwhile)
    convert(source, tmp_path / "s.zarr", progress=False)
    assert failed


@pytest.mark.parametrize("is_linux", [True, False])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_appears_meanwhile_is_not_replaced(
    kind: str, is_linux: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_linux:
        monkeypatch.setattr("litrt.staging._rename", lambda *_: False)
    target = tmp_path / "s.zarr"
    with Staging(target, None) as staging:
        staging.begin()
        if kind == "file":
            target.write_text("mine")
        else:
            target.mkdir()
            (target / "thesis.tex").write_text("mine")
        with pytest.raises(StoreError, match=r"s\.zarr exists, which it did not before: choose another path"):
            staging.publish()
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["mine"]


@pytest.mark.parametrize("key", [None, "key"])
def test_a_removal_that_is_killed_leaves_what_the_next_one_knows(
    key: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is removed is a store that has been replaced, and then what a failed conversion has written."""
    target, whole = tmp_path / "s.zarr", {"a": torch.ones(3), "b": torch.ones(3)}
    convert(whole, target, progress=False)

    def killed_after(n_removed: int) -> Callable[[Path], None]:
        removed: list[Path] = []

        def remove_or_fail(path: Path) -> None:
            if len(removed) == n_removed:
                raise KeyboardInterrupt
            removed.append(path)
            remove(path)

        return remove_or_fail

    for n_removed in range(3):
        monkeypatch.setattr("litrt.staging.remove", killed_after(n_removed))
        with pytest.raises(KeyboardInterrupt):
            convert(whole, target, overwrite=True, progress=False)
        assert (tmp_path / "s.zarr.partial").exists()
        monkeypatch.undo()
        with Staging(target, key) as staging:
            monkeypatch.setattr("litrt.staging.remove", killed_after(1))
            with contextlib.suppress(KeyboardInterrupt):
                staging.begin()
            monkeypatch.undo()
        assert not (tmp_path / "s.zarr.partial").exists()


def test_a_store_is_replaced_in_one_step_where_the_system_can(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not exchange(tmp_path / "one", tmp_path / "other"):
        pytest.skip("this system cannot exchange two names")
    assert (tmp_path / "one" / "other").exists()
    assert (tmp_path / "other" / "one").exists()
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "one", tmp_path / "none")


def test_without_that_it_is_replaced_in_two(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("litrt.staging.exchange", lambda one, other: False)
    expected = undisturbed(source, tmp_path)
    convert({"old": torch.ones(3)}, tmp_path / "s.zarr", progress=False)
    (tmp_path / "s.zarr.replaced").mkdir()  # what a killed one left
    convert(source, tmp_path / "s.zarr", overwrite=True, progress=False)
    assert tree(tmp_path / "s.zarr") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "s.zarr", "whole.zarr"]
    (tmp_path / "s.zarr.replaced").mkdir()
    (tmp_path / "s.zarr.replaced" / "thesis.tex").write_text("mine")
    convert(source, tmp_path / "s.zarr", overwrite=True, progress=False)
    assert tree(tmp_path / "s.zarr") == expected
    assert tree(tmp_path / "s.zarr.replaced") == {"thesis.tex": b"mine"}
    assert len(list(tmp_path.iterdir())) == 4
