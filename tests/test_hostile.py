"""Stores made by somebody who means harm, or broken in ways that no disk breaks them: refused, and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from checkpoints import write_gguf, write_lit, write_zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import litrt
from bench.hostile import Safetensors, changed, changed_bytes, changed_document, read_store, safetensors_file, weights
from litrt.arrays import METADATA, node_name
from litrt.checkpoint import open_source
from litrt.convert import convert
from litrt.reader import Reader
from litrt.store import open_store

MOST_BYTES = 64 << 20
"""No tensor of these stores is anywhere near as large."""


@pytest.fixture(scope="module")
def made() -> Iterator[Path]:
    root = Path(tempfile.mkdtemp())
    convert(weights(), root / "plain.zarr", progress=False)
    convert(weights(), root / "packed.zarr", compress="zstd", progress=False)
    yield root
    shutil.rmtree(root)


def use(root: Path) -> None:
    """Opens a store and reads all of it; a refusal is an answer, any other error is not."""
    with contextlib.suppress(litrt.LitrtError, FileNotFoundError):
        read_store(root)


@pytest.fixture(autouse=True)
def _no_large_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def bounded(*size: Any, **options: Any) -> torch.Tensor:
        made = empty(*size, **{**options, "device": "meta"})
        assert made.nbytes < MOST_BYTES, f"{made.nbytes} bytes asked for"
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", bounded)


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "plain.zarr", tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


def rewrite(file: Path, path: tuple[Any, ...], value: Any) -> None:
    file.write_text(json.dumps(changed(json.loads(file.read_text()), path, value, "put")))


# Anything.

RANDOM = st.randoms(use_true_random=False)


@contextlib.contextmanager
def rewritten(file: Path, content: bytes) -> Iterator[None]:
    whole = file.read_bytes()
    try:
        file.write_bytes(content)
        yield
    finally:
        file.write_bytes(whole)


@given(RANDOM)
@settings(max_examples=400)
def test_metadata_of_any_kind_is_read_or_refused(made: Path, random: Random) -> None:
    root = made / random.choice(["plain.zarr", "packed.zarr"])
    file = root / random.choice(["", "w", "tied", "scalar", "empty"]) / "zarr.json"
    document = changed_document(random, json.loads(file.read_bytes()))
    with rewritten(file, json.dumps(document).encode()):
        use(root)


@given(RANDOM)
@settings(max_examples=200)
def test_bytes_of_any_kind_are_read_or_refused(made: Path, random: Random) -> None:
    root = made / random.choice(["plain.zarr", "packed.zarr"])
    file = random.choice(sorted(file for file in root.rglob("*") if file.is_file()))
    with rewritten(file, changed_bytes(random, file.read_bytes())):
        use(root)


@given(RANDOM)
@settings(max_examples=300)
def test_a_safetensors_header_of_any_kind_is_read_or_refused(random: Random) -> None:
    text = json.dumps(changed_document(random, Safetensors.HEADER)).encode()
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "model.safetensors")
        file.write_bytes(safetensors_file(text, bytes(248)))
        with contextlib.suppress(litrt.LitrtError), open_source(file) as source:
            assert sum(source.fetch(name).nbytes for name in source.names) <= 248


def fetch_all(path: Path, most_bytes: int) -> None:
    """Opens a checkpoint and reads all of it; a refusal is an answer, any other error is not."""
    try:
        with open_source(path) as source:
            for name in source.names:
                with contextlib.suppress(litrt.LitrtError):
                    tensor = source.fetch(source.aliases.get(name, name))
                    assert tensor.nbytes <= most_bytes
                    if source.sizes is not None:
                        assert source.sizes[source.aliases.get(name, name)] == (tensor.numel(), tensor.dtype)
    except litrt.LitrtError:
        pass


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of other programs."""
    root = tmp_path_factory.mktemp("others")
    made = {"w": torch.randn(20, 3), "n": torch.arange(4.0), "empty": torch.ones(0, 2), "one": torch.tensor(1.0)}
    write_lit(root / "lit", made, "float32")
    for version in (2, 3):
        write_zarr(root / f"v{version}.zarr", {"h/w": made["w"], "n": made["n"]}, version, compressors=None)
    return root


@given(RANDOM)
@settings(max_examples=200)
def test_metadata_of_pytorch_lit_of_any_kind_is_read_or_refused(others: Path, random: Random) -> None:
    file = others / "lit" / random.choice(["meta.json", "model-meta.json"])
    with rewritten(file, json.dumps(changed_document(random, json.loads(file.read_bytes()))).encode()):
        fetch_all(others / "lit" / "meta.json", 260)


@given(RANDOM)
@settings(max_examples=150)
@pytest.mark.filterwarnings("ignore")
def test_metadata_of_a_group_of_any_kind_is_read_or_refused(others: Path, random: Random) -> None:
    root = others / random.choice(["v2.zarr", "v3.zarr"])
    file = random.choice(sorted(file for file in root.rglob("*") if file.name in METADATA))
    with rewritten(file, json.dumps(changed_document(random, json.loads(file.read_bytes()))).encode()):
        fetch_all(root, MOST_BYTES)


@given(RANDOM)
@settings(max_examples=150)
def test_a_gguf_file_of_any_kind_is_read_or_refused(random: Random) -> None:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "m.gguf")
        write_gguf(file, {"w": torch.ones(20, 3), "half": torch.ones(4, dtype=torch.bfloat16), "one": torch.ones(1)})
        content = changed_bytes(random, file.read_bytes())
        file.write_bytes(content)
        fetch_all(file, len(content))


# What somebody would think of.


@pytest.mark.parametrize("name", ["..", "../../w", "/etc", "a/../../b", "w\0", "__w", "zarr.json", "C:\\w", "."])
def test_no_name_leads_out_of_a_store(name: str, tmp_path: Path) -> None:
    assert len(Path(node_name(name)).parts) == 1
    (tmp_path / "in").mkdir()
    store = convert({name: torch.ones(3)}, tmp_path / "in" / "s.zarr", progress=False)
    assert torch.equal(Reader(store).read_tensor(name), torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["s.zarr"]


@pytest.mark.parametrize(
    "aliases",
    [{"tie": "tie"}, {"tie": "tied", "tied": "tie"}, {"tie": "none"}, {"tie": ["tied"]}, {"tie": None}, ["tie"]],
)
def test_aliases_that_lead_nowhere_are_refused(aliases: Any, store: Path) -> None:
    rewrite(store / "zarr.json", ("attributes", "litrt", "aliases"), aliases)
    with pytest.raises(litrt.StoreError, match=r"is incomplete|is not a litrt store"):
        open_store(store)


@pytest.mark.parametrize("shape", [[1 << 40], [1 << 31, 1 << 31], [1 << 62, 1 << 62], [700 << 20, 50]])
@pytest.mark.parametrize("is_one_chunk", [True, False])
def test_a_tensor_that_cannot_be_there_is_refused_before_memory_is_taken(
    shape: list[int], is_one_chunk: bool, store: Path
) -> None:
    rewrite(store / "w" / "zarr.json", ("shape",), shape)
    chunks = shape if is_one_chunk else [1000, *shape[1:]]
    rewrite(store / "w" / "zarr.json", ("chunk_grid", "configuration", "chunk_shape"), chunks)
    with pytest.raises(litrt.StoreError, match=r"'w' has|zarr\.json is damaged|attributes of 'w' are damaged"):
        open_store(store)


def test_metadata_without_an_end_is_refused(store: Path) -> None:
    for file in (store / "zarr.json", store / "w" / "zarr.json"):
        whole = file.read_bytes()
        file.write_text("[" * 1_000_000)
        with pytest.raises(litrt.StoreError, match="is damaged: it is not JSON"):
            open_store(store)
        os.truncate(file, 1 << 40)
        with pytest.raises(litrt.StoreError, match="is not the metadata of a store"):
            open_store(store)
        file.unlink()
        os.mkfifo(file)
        with pytest.raises(litrt.StoreError, match=r"is not the metadata of a store|is not a litrt store"):
            open_store(store)
        file.unlink()
        file.write_bytes(whole)
    use(store)


@pytest.mark.parametrize("kind", ["pipe", "zeros", "loop", "directory"])
def test_a_chunk_that_is_no_file_is_an_error_and_not_waited_for(kind: str, store: Path) -> None:
    chunk = store / "w" / "c" / "0" / "0"
    chunk.unlink()
    if kind == "pipe":
        os.mkfifo(chunk)
    elif kind == "directory":
        chunk.mkdir()
    else:
        chunk.symlink_to("/dev/zero" if kind == "zeros" else chunk)
    reader = Reader(open_store(store))
    with pytest.raises(litrt.CorruptWeightError, match=r"weight 'w': .*/w/c/0/0"):
        reader.read_tensor("w")


def test_a_bomb_of_compressed_zeros_is_refused(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "packed.zarr", tmp_path / "s.zarr")
    file = tmp_path / "s.zarr" / "w" / "zarr.json"
    rewrite(file, ("shape",), [1 << 30, 50])
    rewrite(file, ("chunk_grid", "configuration", "chunk_shape"), [1 << 30, 50])
    with pytest.raises(litrt.StoreError, match=r"is incomplete: 'w' has 214748364800 bytes and its files \d+"):
        open_store(tmp_path / "s.zarr")


def test_a_store_is_never_code(tmp_path: Path) -> None:
    """What torch's files may have beside tensors is refused, and no function in it is called."""

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"w": torch.ones(2), "x": Evil()}, tmp_path / "model.pt")
    with pytest.raises(litrt.StoreError, match="cannot load"):
        convert(tmp_path / "model.pt", tmp_path / "s.zarr", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
