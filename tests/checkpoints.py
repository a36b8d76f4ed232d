"""Checkpoints as other programs write them, and whether a store holds what is in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr

import litrt
from litrt.reader import Reader


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.dtype, one.shape, bits(one)) == (other.dtype, other.shape, bits(other))


def holds(store: litrt.Store, expected: Mapping[str, torch.Tensor]) -> bool:
    """Says whether a store has these tensors, and no others, bit for bit."""
    reader = Reader(store)
    found = {name: reader.read_tensor(name) for name in store}
    return found.keys() == expected.keys() and all(same(found[name], expected[name]) for name in expected)


def write_lit(folder: Path, weights: Mapping[str, torch.Tensor], dtype: str) -> None:
    """Writes a folder as PyTorch-LIT 0.1.5 and 0.1.7 do; 0.1.6 fails to write one.

    All weights, in their order and cast to one dtype of numpy, are side by side in `model.bin`. `model-meta.json` has
    for each its "shape" and its "bound", the elements of that file where it begins and ends; and "_info": how many
    elements there are in all ("size"), the dtype ("type") and the elements of the largest ("largest_param_size").
    `meta.json` says "method": "np-memmap" and names the two files ("model", "meta").
    """
    folder.mkdir()
    meta: dict[str, Any] = {}
    end = 0
    for name, tensor in weights.items():
        meta[name] = {"bound": [end, end + tensor.numel()], "shape": list(tensor.shape)}
        end += tensor.numel()
    largest = max(tensor.numel() for tensor in weights.values())
    meta["_info"] = {"size": end, "type": dtype, "largest_param_size": largest}
    values = [tensor.numpy().astype(dtype).tobytes() for tensor in weights.values()]
    (folder / "model.bin").write_bytes(b"".join(values))
    (folder / "model-meta.json").write_text(json.dumps(meta))
    told = {"method": "np-memmap", "model": "model.bin", "meta": "model-meta.json"}
    (folder / "meta.json").write_text(json.dumps(told))


def write_gguf(path: Path, weights: Mapping[str, Any], **options: Any) -> None:
    """Writes a file with gguf's own writer; a weight may be a pair of bytes and the quantised type that they are of."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama", **options)
    writer.add_token_list(["a", "bc"])
    for name, weight in weights.items():
        if isinstance(weight, tuple):
            writer.add_tensor(name, weight[0], raw_dtype=weight[1])
        elif weight.dtype == torch.bfloat16:
            writer.add_tensor(name, weight.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_zarr(store: Any, weights: Mapping[str, torch.Tensor], zarr_format: Any = 3, **options: Any) -> None:
    """Writes a group with zarr-python alone; a name with slashes is that of an array in a group in the group."""
    root = zarr.create_group(store, zarr_format=zarr_format)
    for name, tensor in weights.items():
        array = root.create_array(name, shape=tuple(tensor.shape), dtype=tensor.numpy().dtype, **options)
        array[...] = tensor.numpy()
