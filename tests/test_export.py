"""Stores back to safetensors files, and mappings that read one tensor at a time."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import litrt
from litrt.cli import main
from litrt.convert import convert
from litrt.export import export
from litrt.lazy import lazy_state_dict
from litrt.reader import Reader
from litrt.staging import new_file

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64),
)


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for number, dtype in enumerate(DTYPES):
        n_bytes = 3 * (5 + number) * dtype.itemsize
        content = torch.randint(
            0, 2 if dtype == torch.bool else 256, (n_bytes,), generator=generator, dtype=torch.uint8
        )
        made[f"w.{dtype}"] = content.view(dtype).view(3, 5 + number)
    return made | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "ünïcode / x": torch.ones(2)}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Says whether two tensors have the same bits; NaNs are equal if they are the same."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


# Export.


@pytest.mark.parametrize("compress", [None, "lz4"])
def test_a_store_goes_back_to_a_file_bit_for_bit(
    compress: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litrt.arrays.TARGET_CHUNK_BYTES", 4096)
    made = weights() | {"large": torch.randn(300, 70)}
    save_file(made, tmp_path / "model.safetensors")
    store = convert(tmp_path / "model.safetensors", tmp_path / "s.zarr", compress=compress, progress=False)
    assert export(store, tmp_path / "back.safetensors", progress=False) == tmp_path / "back.safetensors"
    found = load_file(tmp_path / "back.safetensors")
    assert found.keys() == made.keys()
    assert all(same(found[name], made[name]) for name in made)
    again = convert(tmp_path / "back.safetensors", tmp_path / "again.zarr", compress=compress, progress=False)
    assert dict(again) == dict(store)
    with safe_open(tmp_path / "back.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert not list(tmp_path.glob(".*"))


def test_every_name_has_its_values(tmp_path: Path) -> None:
    tied = torch.randn(4, 3)
    convert({"a": tied, "b": tied}, tmp_path / "s.zarr", progress=False)
    export(tmp_path / "s.zarr", tmp_path / "m.safetensors", progress=False)
    found = load_file(tmp_path / "m.safetensors")
    assert torch.equal(found["a"], tied)
    assert torch.equal(found["b"], tied)


def test_what_cannot_be_exported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = convert({"w": torch.ones(1000)}, tmp_path / "s.zarr", progress=False)
    file = tmp_path / "m.safetensors"
    file.write_text("mine")
    with pytest.raises(litrt.StoreError, match="exists: choose another path, or pass overwrite=True"):
        export(store, file)
    with pytest.raises(litrt.StoreError, match=r"exists, and is a folder: choose another path\."):
        export(store, tmp_path, overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**12, free=4000))
        with pytest.raises(litrt.StoreError, match=r"needs 4\.\d+ kB and the disk has 4\.00 kB free"):
            export(store, file, overwrite=True)
    assert file.read_text() == "mine"
    chunk = tmp_path / "s.zarr" / "w" / "c" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    with pytest.raises(litrt.CorruptWeightError):
        export(store, file, overwrite=True, progress=False)
    assert file.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors", "s.zarr"]
    other = convert({"w": torch.ones(2, dtype=torch.complex128)}, tmp_path / "o.zarr", progress=False)
    with pytest.raises(litrt.StoreError, match="safetensors has no dtype complex128, which 'w' has"):
        export(other, tmp_path / "other.safetensors")
    named = convert({"__metadata__": torch.ones(2)}, tmp_path / "n.zarr", progress=False)
    with pytest.raises(litrt.StoreError, match="no tensor of the name '__metadata__'"):
        export(named, tmp_path / "other.safetensors")


def test_pairs_of_four_bits_are_counted_as_numbers(tmp_path: Path) -> None:
    pairs = torch.arange(24, dtype=torch.uint8).view(torch.float4_e2m1fn_x2).reshape(4, 6)
    store = convert({"w": pairs, "x": torch.ones(3)}, tmp_path / "s.zarr", progress=False)
    found = load_file(export(store, tmp_path / "m.safetensors", progress=False))
    assert same(found["w"], pairs)
    assert same(found["x"], torch.ones(3))
    scalar = convert({"w": pairs[0, 0]}, tmp_path / "t.zarr", progress=False)
    with pytest.raises(litrt.StoreError, match=r"no scalar of float4_e2m1fn_x2, .* and 'w' is one: reshape it"):
        export(scalar, tmp_path / "t.safetensors")


def test_two_exports_to_one_file_do_not_meet(tmp_path: Path) -> None:
    store = convert({"w": torch.ones(9)}, tmp_path / "s.zarr", progress=False)
    file = tmp_path / "m.safetensors"
    with new_file(file) as out:
        out.write(b"of the other one")
        for overwrite in (False, True):
            with pytest.raises(litrt.StoreError, match=r"m\.safetensors is being written by another export: wait for"):
                export(store, file, overwrite=overwrite, progress=False)
    assert file.read_bytes() == b"of the other one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors", "s.zarr"]


KILLED = """
import os, sys
from litrt import export, reader
reader.Reader.read_part = lambda *_: os._exit(9)
export(sys.argv[1], sys.argv[2], progress=False)
"""


def test_what_a_killed_export_has_left_does_not_block_the_next(tmp_path: Path) -> None:
    store = convert({"w": torch.ones(90_000)}, tmp_path / "s.zarr", progress=False)
    file = tmp_path / "m.safetensors"
    done = subprocess.run([sys.executable, "-c", KILLED, store.path, str(file)], check=False)
    assert done.returncode == 9
    assert len(list(tmp_path.iterdir())) == 2
    export(store, file, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors", "s.zarr"]


def test_a_file_that_got_its_name_before_its_export_was_killed_is_not_emptied(tmp_path: Path) -> None:
    with new_file(tmp_path / "m") as out:
        out.write(b"first")
    os.link(tmp_path / "m", tmp_path / ".m.litrt-partial")  # as where names are given by links
    (tmp_path / "m").rename(tmp_path / "kept")
    with new_file(tmp_path / "m") as out:
        out.write(b"second")
    assert (tmp_path / "kept").read_bytes() == b"first"
    assert (tmp_path / "m").read_bytes() == b"second"


@pytest.mark.parametrize("kind", ["Linux", "links", "no links"])
def test_a_file_that_appears_meanwhile_is_not_replaced(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: Path) -> None:
        raise OSError(95, "Operation not supported")

    store = convert({"w": torch.ones(9)}, tmp_path / "s.zarr", progress=False)
    if kind != "Linux":
        monkeypatch.setattr("litrt.staging._rename", lambda *_: False)
    if kind == "no links":
        monkeypatch.setattr(os, "link", no_links)
    file = tmp_path / "m.safetensors"
    export(store, file, progress=False)
    file.unlink()
    read = Reader.read_part

    def meanwhile(*args: Any) -> None:
        file.write_text("mine")
        read(*args)

    monkeypatch.setattr(Reader, "read_part", meanwhile)
    with pytest.raises(litrt.StoreError, match=r"m\.safetensors exists, which it did not before: choose another path"):
        export(store, file, progress=False)
    assert file.read_text() == "mine"
    export(store, file, overwrite=True, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors", "s.zarr"]


def test_a_file_that_is_called_partial_is_the_users(tmp_path: Path) -> None:
    store = convert({"w": torch.ones(9)}, tmp_path / "s.zarr", progress=False)
    (tmp_path / "m.safetensors.partial").write_text("mine")
    export(store, tmp_path / "m.safetensors", progress=False)
    assert (tmp_path / "m.safetensors.partial").read_text() == "mine"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert({"w": torch.ones(1000)}, tmp_path / "s.zarr", progress=False)
    arguments = ["export", str(tmp_path / "s.zarr"), str(tmp_path / "m.safetensors")]
    assert main(arguments) == 0
    assert "m.safetensors: 4.1" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "m.safetensors exists: choose another path, or pass --overwrite to replace it" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


def test_a_disk_that_takes_no_more_is_said_of_a_file(tmp_path: Path) -> None:
    store = convert({"w": torch.ones(90_000)}, tmp_path / "s.zarr", progress=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*m\.safetensors'"):
            export(store, tmp_path / "m.safetensors", progress=False)
        with pytest.raises(OSError, match=r"File too large: '.*t\.zarr\.partial"):
            convert({"w": torch.ones(90_000)}, tmp_path / "t.zarr", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["s.zarr"]


# Lazy.


@pytest.fixture(params=["safetensors", "pt", "shards", "store", "directory"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    made = weights()
    if request.param == "safetensors":
        save_file(made, tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors"
    if request.param == "pt":
        torch.save(made, tmp_path / "model.pt")
        return tmp_path / "model.pt"
    if request.param == "store":
        convert(made, tmp_path / "s.zarr", progress=False)
        return tmp_path / "s.zarr"
    if request.param == "directory":
        save_file(made, tmp_path / "model.safetensors")
        return tmp_path
    names = list(made)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, of_it in shards.items():
        save_file({name: made[name] for name in of_it}, tmp_path / file)
    index = {"weight_map": {name: file for file, of_it in shards.items() for name in of_it}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path / "model.safetensors.index.json"


def test_one_tensor_is_read_at_a_time(path: Path) -> None:
    made = weights()
    with lazy_state_dict(path) as lazy:
        assert lazy.keys() == made.keys()
        assert len(lazy) == len(made)
        for name in [*made, *reversed(made)]:
            assert name in lazy
            assert same(lazy[name], made[name]), name
        with pytest.raises(litrt.WeightNotFoundError, match=r"has no weight 'none'"):
            lazy["none"]
        kept = lazy["scalar"]
    assert kept.item() == 2.5
    lazy.close()
    with pytest.raises(litrt.ClosedError, match="is closed"):
        lazy["scalar"]
    assert len(lazy) == len(made)


def test_it_is_a_source(path: Path, tmp_path: Path) -> None:
    with lazy_state_dict(path) as lazy:
        store = convert(lazy, tmp_path / "copy.zarr", progress=False)
    assert {*store} == {*weights()}


def test_nothing_is_read_for_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {f"w{n}": torch.randn(1000) for n in range(20)}
    store = convert(made, tmp_path / "s.zarr", progress=False)
    read: list[str] = []
    inner = Reader.read_part

    def noted(self: Any, piece: Any, part: np.ndarray[Any, Any]) -> None:
        read.append(piece.name)
        inner(self, piece, part)

    monkeypatch.setattr("litrt.reader.Reader.read_part", noted)
    lazy = lazy_state_dict(store.path)
    assert sorted(lazy) == sorted(made)
    assert "w3" in lazy
    assert not read
    assert torch.equal(lazy["w3"], made["w3"])
    assert read == ["w3"]


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        lazy_state_dict(tmp_path / "none")
    with pytest.raises(litrt.StoreError, match="has no checkpoint"):
        lazy_state_dict(tmp_path)
