"""Checking all of a store, and repairing it: nothing that is damaged is missed, and nothing else is written."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr

import litrt
from litrt.cli import main
from litrt.convert import convert
from litrt.reader import Reader
from litrt.repair import repair
from litrt.verify import verify


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tied = torch.randn(40, 7, generator=generator)
    return {
        "large": torch.randn(1 << 9, 1 << 10, generator=generator),
        "tied": tied,
        "tie": tied,
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "mask": torch.ones(9, dtype=torch.bool),
    }


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("litrt.arrays.TARGET_CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(importlib.import_module("litrt.convert"), "CHUNK_BYTES", 1 << 20)


@pytest.fixture(params=[None, "zstd"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> litrt.Store:
    return convert(weights(), tmp_path / "s.zarr", compress=request.param, progress=False)


def chunks(store: litrt.Store) -> list[Path]:
    assert store.root is not None
    return sorted(file for file in Path(store.root).rglob("*") if file.is_file() and file.name != "zarr.json")


def test_a_whole_store_is_whole(store: litrt.Store, tmp_path: Path) -> None:
    assert verify(store, progress=False) == []
    assert verify(tmp_path / "s.zarr", progress=False) == []


def change(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped": change,
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "empty": lambda file: file.write_bytes(b""),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "missing": Path.unlink,
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "directory": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_damaged_chunk_is_named(store: litrt.Store, kind: str) -> None:
    files = chunks(store)
    assert len(files) >= 5
    for file in files:
        DAMAGE[kind](file)
    found = verify(store, progress=False)
    assert sorted(error.file for error in found) == [str(file) for file in files]
    assert {error.name for error in found} == {"large", "tied", "scalar", "mask"}
    for error in found:
        assert error.file in str(error)
        assert repr(error.name) in str(error)


@pytest.mark.parametrize("compress", [None, "lz4"])
@pytest.mark.parametrize("is_zip", [False, True])
def test_a_chunk_that_is_whole_and_belongs_elsewhere_is_found(
    compress: str | None, is_zip: bool, tmp_path: Path
) -> None:
    noise = torch.zeros(512, 512)
    noise[0, :64] = torch.arange(64.0)  # so that both chunks compress, and to the same size
    tensors = {"a": noise, "b": noise.flip(0), "c": torch.zeros(3)}
    store = convert(tensors, tmp_path / "s.zarr", compress=compress, progress=False)
    files = {name: tmp_path / "s.zarr" / name / "c" / "0" / "0" for name in "ab"}
    reader = Reader(store)
    assert torch.equal(reader.read_tensor("a"), noise)
    content = {name: file.read_bytes() for name, file in files.items()}
    files["a"].write_bytes(content["b"])
    files["b"].write_bytes(content["a"])
    opened: litrt.Store = store
    if is_zip:
        shutil.make_archive(str(tmp_path / "s"), "zip", tmp_path / "s.zarr")
        opened = litrt.open_store(tmp_path / "s.zip")
        reader.close()
        reader = Reader(opened)
    for name in "ab":
        with pytest.raises(litrt.StoreChangedError, match=f"weight '{name}': .* is whole, but it is not what"):
            reader.read_tensor(name)
    assert torch.equal(reader.read_tensor("c"), tensors["c"])
    found = verify(opened, progress=False)
    assert [error.name for error in found] == ["a", "b"]
    reader.close()
    if not is_zip:
        assert {error.file for error in repair(tensors, store.path, progress=False)} == {*map(str, files.values())}
        assert {name: file.read_bytes() for name, file in files.items()} == content


@pytest.mark.parametrize("compress", [None, "lz4"])
def test_every_byte_that_flips_is_found(compress: str | None, tmp_path: Path) -> None:
    tensors = {"a": torch.arange(150, dtype=torch.int64), "b": torch.randn(5, 3), "c": torch.zeros(10, 30)}
    store = convert(tensors, tmp_path / "s.zarr", compress=compress, progress=False)
    reader = Reader(store)
    n_flipped = 0
    for file in chunks(store):
        whole = file.read_bytes()
        for position in range(len(whole)):
            content = bytearray(whole)
            content[position] ^= 1 << position % 8
            file.write_bytes(content)
            with pytest.raises(litrt.CorruptWeightError):
                reader.read_tensor(file.relative_to(tmp_path / "s.zarr").parts[0])
            n_flipped += 1
        file.write_bytes(whole)
    assert n_flipped > 1000
    assert verify(store, progress=False) == []


def test_a_damaged_checksum_of_a_block_is_named(tmp_path: Path) -> None:
    convert(weights(), tmp_path / "s.zarr", progress=False)
    file = tmp_path / "s.zarr" / "large" / "zarr.json"
    document = json.loads(file.read_text())
    told = document["attributes"]["litrt"]["blocks"]
    told["crc32c"] = ("A" if told["crc32c"][0] != "A" else "B") + told["crc32c"][1:]
    file.write_text(json.dumps(document))
    (error,) = verify(tmp_path / "s.zarr", progress=False)
    assert error.name == "large"
    assert error.file == str(file)


@pytest.mark.parametrize("name", ["large", "tied"])
def test_a_damaged_checksum_of_a_chunk_is_found_and_written_again(name: str, tmp_path: Path) -> None:
    convert(weights(), tmp_path / "s.zarr", progress=False)
    file = tmp_path / "s.zarr" / name / "zarr.json"
    document = json.loads(file.read_text())
    told = document["attributes"]["litrt"]["chunks"]
    whole = told["crc32c"]
    told["crc32c"] = ("A" if whole[0] != "A" else "B") + whole[1:]
    file.write_text(json.dumps(document))
    (error,) = verify(tmp_path / "s.zarr", progress=False)
    assert error.name == name
    # Blocks say that the values are right; where there are none, either may be.
    assert error.file == str(file if name == "large" else tmp_path / "s.zarr" / name / "c" / "0" / "0")
    before = {path: path.read_bytes() for path in (tmp_path / "s.zarr" / name / "c").rglob("*") if path.is_file()}
    repair(weights(), tmp_path / "s.zarr", progress=False)
    assert json.loads(file.read_text())["attributes"]["litrt"]["chunks"]["crc32c"] == whole
    assert before == {path: path.read_bytes() for path in before}
    assert verify(tmp_path / "s.zarr", progress=False) == []


def test_a_store_that_was_made_without_checksums_of_chunks_is_read(tmp_path: Path) -> None:
    convert(weights(), tmp_path / "s.zarr", progress=False)
    for file in (tmp_path / "s.zarr").glob("*/zarr.json"):
        document = json.loads(file.read_text())
        document["attributes"]["litrt"].pop("chunks", None)
        file.write_text(json.dumps(document))
    assert verify(tmp_path / "s.zarr", progress=False) == []
    change(chunks(litrt.open_store(tmp_path / "s.zarr"))[0])
    assert len(repair(weights(), tmp_path / "s.zarr", progress=False)) == 1


def test_a_store_that_is_read_through_zarr_python(tmp_path: Path) -> None:
    store = convert(weights(), tmp_path / "s.zarr", progress=False)
    memory: dict[str, Any] = {
        str(file.relative_to(tmp_path / "s.zarr")): zarr.core.buffer.cpu.Buffer.from_bytes(file.read_bytes())
        for file in (tmp_path / "s.zarr").rglob("*")
        if file.is_file()
    }
    key = str(chunks(store)[0].relative_to(tmp_path / "s.zarr"))
    assert verify(zarr.storage.MemoryStore(memory), progress=False) == []
    memory[key] = zarr.core.buffer.cpu.Buffer.from_bytes(b"x" + memory[key].to_bytes()[1:])
    (error,) = verify(zarr.storage.MemoryStore(memory), progress=False)
    assert error.name in store


def lose_chunks(array: Path) -> None:
    shutil.rmtree(array / "c")


def empty_chunks(array: Path) -> None:
    for file in array.joinpath("c").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


CHUNKS_LOST: dict[str, Callable[[Path], object]] = {
    "two of them": lambda array: [(array / "c" / str(row) / "0").unlink() for row in (0, 1)],
    "their folder": lose_chunks,
    "their bytes": empty_chunks,
    "their folder, for a file": lambda array: (lose_chunks(array), (array / "c").write_text("x")),
    "a link to a chunk elsewhere": lambda array: move_out(array / "c" / "1" / "0"),
    "a link to all elsewhere": lambda array: move_out(array / "c"),
}


def move_out(path: Path) -> None:
    """Leaves a link to where something was moved, out of the store."""
    elsewhere = Path(str(path).partition("s.zarr")[0]) / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


METADATA_LOST: dict[str, Callable[[Path], object]] = {
    "emptied": lambda array: (array / "zarr.json").write_text(""),
    "other": lambda array: (array / "zarr.json").write_text("[]"),
    "senseless": lambda array: (array / "zarr.json").write_text('{"zarr_format": 3, "node_type": "array"}'),
    "gone": lambda array: (array / "zarr.json").unlink(),
    "gone with all": shutil.rmtree,
}


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a store with a weight that is looked for before it is believed in."""
    monkeypatch.setattr("litrt.tensors.LARGE_BYTES", 1 << 19)
    convert(weights(), tmp_path / "s.zarr", progress=False)
    return tmp_path / "s.zarr"


@pytest.mark.parametrize("kind", CHUNKS_LOST)
def test_a_weight_that_has_lost_most_of_its_chunks_is_named_and_written_again(kind: str, large: Path) -> None:
    before = {file: file.read_bytes() for file in large.rglob("*") if file.is_file()}
    change(large / "mask" / "c" / "0")
    CHUNKS_LOST[kind](large / "large")
    outside = {file: file.read_bytes() for file in (large.parent / "elsewhere").rglob("*") if file.is_file()}
    found = {(error.name, error.file) for error in verify(large, progress=False)}
    assert ("mask", str(large / "mask" / "c" / "0")) in found
    assert {name for name, _ in found} == {"large", "mask"}
    if kind != "a link to a chunk elsewhere":
        assert {file for name, file in found if name == "large"} == {
            str(large / "large" / "c" / row / "0") for row in "01"
        }
    assert {(error.name, error.file) for error in repair(weights(), large, progress=False)} == found
    assert {file: file.read_bytes() for file in large.rglob("*") if file.is_file()} == before
    assert not any(path.is_symlink() for path in large.rglob("*"))
    assert {file: file.read_bytes() for file in outside} == outside
    assert verify(large, progress=False) == []


@pytest.mark.parametrize("is_zip", [False, True])
@pytest.mark.parametrize("kind", METADATA_LOST)
def test_a_weight_that_has_lost_its_metadata_is_named_and_the_others_are_checked(
    kind: str, is_zip: bool, large: Path
) -> None:
    change(large / "mask" / "c" / "0")
    for name in ("tied", "large"):
        METADATA_LOST[kind](large / name)
    store = Path(shutil.make_archive(str(large), "zip", large)) if is_zip else large
    found = [(error.name, error.file.rpartition("s.zarr/")[2]) for error in verify(store, progress=False)]
    assert found[:2] == [("large", "large/zarr.json"), ("tied", "tied/zarr.json")]
    assert [name for name, _ in found[2:]] == ["mask"]
    with pytest.raises(litrt.StoreError, match=r"is incomplete|is damaged|cannot be read as JSON"):
        litrt.open_store(store)
    if not is_zip:
        before = {file: file.read_bytes() for file in large.rglob("*") if file.is_file()}
        with pytest.raises(litrt.StoreError, match=r"cannot repair .*: weight 'large': .* [Rr]un litrt convert again"):
            repair(weights(), large, progress=False)
        assert {file: file.read_bytes() for file in large.rglob("*") if file.is_file()} == before


def test_what_says_which_weights_there_are_has_to_be_whole(large: Path) -> None:
    document = json.loads((large / "zarr.json").read_text())
    document["attributes"]["litrt"]["aliases"] = {"tie": "none"}
    (large / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(litrt.StoreError, match="is incomplete: 1 of 6 weights are missing"):
        verify(large, progress=False)
    document["attributes"]["litrt"] |= {"aliases": {}, "complete": False}
    (large / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(litrt.StoreError, match="is incomplete"):
        verify(large, progress=False)


def test_no_error_is_made_for_each_of_many_chunks_that_cannot_be_there(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litrt.store._MOST_UNCHECKED", 1)
    shutil.rmtree(large / "large" / "c")
    (error,) = verify(large, progress=False)
    assert "'large' has 2097152 bytes and its files 0" in str(error)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = convert(weights(), tmp_path / "s.zarr", progress=False)
    assert main(["verify", str(tmp_path / "s.zarr")]) == 0
    assert "s.zarr: all 5 weights are whole, 2.10 MB" in capsys.readouterr().out
    damaged = [file for file in chunks(store) if "large" in str(file)]
    for file in damaged:
        change(file)
    assert main(["verify", "--quiet", str(tmp_path / "s.zarr")]) == 1
    printed = capsys.readouterr().out
    assert all(str(file) in printed for file in damaged)
    assert f"{len(damaged)} files of 1 weights are damaged" in printed
    assert main(["verify", str(tmp_path / "none.zarr")]) == 2


# Repair.


def tree(store: litrt.Store) -> dict[Path, tuple[bytes, int]]:
    assert store.root is not None
    files = (file for file in Path(store.root).rglob("*") if file.is_file())
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_damaged_is_written_again_and_nothing_else(store: litrt.Store, kind: str) -> None:
    before = tree(store)
    damaged = chunks(store)[::2]
    for file in damaged:
        DAMAGE[kind](file)
    assert sorted(error.file for error in repair(weights(), store.path, progress=False)) == list(map(str, damaged))
    after = tree(store)
    assert {file: content for file, (content, _) in after.items()} == {
        file: content for file, (content, _) in before.items()
    }
    assert {file for file in after if after[file] != before[file]} <= {*damaged}
    assert verify(store, progress=False) == []
    assert repair(weights(), store.path, progress=False) == []


def test_a_store_of_another_dtype_is_repaired_in_that(tmp_path: Path) -> None:
    store = convert(weights(), tmp_path / "s.zarr", dtype="bfloat16", progress=False)
    before = tree(store)
    for file in chunks(store):
        change(file)
    repair(weights(), store.path, progress=False)
    assert {file: content for file, (content, _) in tree(store).items()} == {
        file: content for file, (content, _) in before.items()
    }


def test_damaged_checksums_of_blocks_are_written_again(tmp_path: Path) -> None:
    store = convert(weights(), tmp_path / "s.zarr", progress=False)
    file = tmp_path / "s.zarr" / "large" / "zarr.json"
    document = json.loads(file.read_text())
    whole = dict(document["attributes"]["litrt"])
    blocks = dict(whole["blocks"])
    blocks["crc32c"] = ("A" if blocks["crc32c"][0] != "A" else "B") + blocks["crc32c"][1:]
    document["attributes"]["litrt"]["blocks"] = blocks
    file.write_text(json.dumps(document))
    assert [error.file for error in repair(weights(), store.path, progress=False)] == [str(file)]
    assert json.loads(file.read_text())["attributes"]["litrt"] == whole
    assert verify(tmp_path / "s.zarr", progress=False) == []


OTHERS: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "it has no 'large'": lambda source: source.pop("large"),
    r"its 'large' has shape \(3,\) in place of \(512, 1024\)": lambda source: source.update(large=torch.ones(3)),
    "its 'large' is torch.int32 in place of torch.float32": lambda source: source.update(large=source["large"].int()),
    "its 'large' has other values than": lambda source: source["large"].add_(1),
}


@pytest.mark.parametrize("said", OTHERS)
@pytest.mark.parametrize("is_one_whole", [True, False])
def test_another_checkpoint_is_refused_and_nothing_is_written(tmp_path: Path, said: str, is_one_whole: bool) -> None:
    store = convert(weights(), tmp_path / "s.zarr", progress=False)
    for file in [file for file in chunks(store) if "large" in str(file)][is_one_whole:]:
        change(file)
    before = tree(store)
    source = weights()
    OTHERS[said](source)
    with pytest.raises(litrt.StoreError, match=f"cannot repair .*s.zarr from this checkpoint: {said}"):
        repair(source, store.path, progress=False)
    assert tree(store) == before


def test_chunks_that_are_read_through_zarr_python_are_not_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their errors have keys in place of files, which are no paths of the working directory."""
    group = zarr.create_group(tmp_path / "s.zarr")
    group.create_array("w", shape=(4, 4), chunks=(2, 2), dtype="float32")[...] = torch.rand(4, 4).numpy()
    group.attrs["litrt"] = {"format": 1, "complete": True, "tensors": ["w"], "aliases": {}}
    (tmp_path / "s.zarr" / "w" / "c" / "0" / "0").write_bytes(b"x")
    (tmp_path / "here" / "w").mkdir(parents=True)
    (tmp_path / "here" / "w" / "thesis.tex").touch()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(litrt.StoreError, match=r"cannot repair .*, as litrt does not read the chunks of 'w' itself"):
        repair({"w": torch.ones(4, 4)}, tmp_path / "s.zarr", progress=False)
    assert (tmp_path / "here" / "w" / "thesis.tex").exists()


def test_the_command_repairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(weights(), tmp_path / "model.pt")
    store = convert(tmp_path / "model.pt", tmp_path / "s.zarr", progress=False)
    arguments = ["convert", "--repair", "--quiet", str(tmp_path / "model.pt"), str(tmp_path / "s.zarr")]
    assert main(arguments) == 0
    assert "s.zarr: nothing is damaged" in capsys.readouterr().out
    change(chunks(store)[0])
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"{chunks(store)[0]} was damaged, and is written again" in printed
    assert "s.zarr: 1 repaired" in printed
    assert main([*arguments, "--dtype", "float16"]) == 2
    assert main(["verify", str(tmp_path / "s.zarr")]) == 0
