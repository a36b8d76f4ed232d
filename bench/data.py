"""Models on disk, in the format of every system: made once, kept, and made one weight at a time."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import litrt
from bench.models import ModelSpec, model_ctor

SAFETENSORS = "model.safetensors"
_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
_ALIGN_BYTES = 64


@contextmanager
def empty_weights() -> Iterator[None]:
    """Makes modules without memory for their parameters; buffers are as they always are."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None:
            self._parameters[name] = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class RandomWeights(Mapping[str, torch.Tensor]):
    """Weights of a model, each made when it is asked for, always the same."""

    def __init__(self, spec: ModelSpec) -> None:
        with torch.device("meta"):
            self.metas: dict[str, torch.Tensor] = dict(model_ctor(spec)().state_dict())

    def __getitem__(self, name: str) -> torch.Tensor:
        meta = self.metas[name]
        if not meta.is_floating_point():
            return torch.zeros(meta.shape, dtype=meta.dtype)
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        values = torch.empty(meta.shape).normal_(0, 0.02, generator=torch.Generator().manual_seed(seed))
        if meta.dim() == 1 and name.endswith("weight"):
            values += 1  # of a norm
        return values.to(meta.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.metas)

    def __len__(self) -> int:
        return len(self.metas)

    @property
    def total_bytes(self) -> int:
        """Bytes of all of them."""
        return sum(meta.nbytes for meta in self.metas.values())


class Data:
    """The files of one model, in a folder of its own.

    Args:
        root: Where such folders are.
        spec: The model.
    """

    def __init__(self, root: Path, spec: ModelSpec) -> None:
        self.spec = spec
        self.folder = root / spec.key
        self.safetensors = self.folder / SAFETENSORS

    def store(self, compress: str) -> Path:
        """Returns where the store with that compression is."""
        return self.folder / ("model.zarr" if compress == "none" else f"model-{compress}.zarr")

    def make(self, systems: list[str], compress: str, tell: Callable[[str], None]) -> None:
        """Makes what is not there yet of what `systems` need."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "model.json").write_text(json.dumps(asdict(self.spec), indent=1) + "\n")
        if not self.safetensors.exists():
            tell(f"making {self.safetensors}")
            save_safetensors(RandomWeights(self.spec), self.safetensors)
        store = self.store(compress)
        if "litrt" in systems and not store.exists():
            tell(f"making {store}")
            litrt.convert(self.safetensors, store, compress=None if compress == "none" else compress)
        if "accelerate" in systems and not (self.folder / "accelerate" / "index.json").exists():
            tell(f"making {self.folder / 'accelerate'}")
            self._make_accelerate()
        if "pytorch-lit" in systems and not (self.folder / "pytorch-lit" / "meta.json").exists():
            tell(f"making {self.folder / 'pytorch-lit'}")
            self._make_pytorch_lit()

    def _make_accelerate(self) -> None:
        from accelerate.utils import offload_state_dict

        offload_state_dict(str(self.folder / "accelerate"), Saved(self.safetensors))

    def _make_pytorch_lit(self) -> None:
        from pytorch_lit import prepare_params

        saved = Saved(self.safetensors)

        class Weights(dict[str, Any]):  # it asks for a dict
            def keys(self) -> Any:
                return saved.keys()

            def __getitem__(self, name: str) -> torch.Tensor:
                return saved[name]

        prepare_params(Weights(), str(self.folder / "pytorch-lit"), progress=False)


class Saved(Mapping[str, torch.Tensor]):
    """Weights in a safetensors file, each copied to memory when it is asked for."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        opened: Any = safe_open
        self._file = opened(path, framework="pt")
        self._names: list[str] = list(self._file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        values: torch.Tensor = self._file.get_tensor(name)
        return values.clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def save_safetensors(weights: RandomWeights, path: Path) -> None:
    """Writes weights one at a time, so that they are never all in memory."""
    header: dict[str, object] = {}
    offset = 0
    for name, meta in weights.metas.items():
        end = offset + meta.nbytes
        header[name] = {"dtype": _DTYPE_NAMES[meta.dtype], "shape": list(meta.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    # So that a mapping of the file has the values where kernels like them.
    encoded = encoded.ljust(math.ceil((len(encoded) + 8) / _ALIGN_BYTES) * _ALIGN_BYTES - 8)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in weights:
            values = weights[name]
            if values.nbytes:
                values.reshape(-1).view(torch.uint8).numpy().tofile(file)
    partial.rename(path)


def bytes_under(path: Path) -> int:
    """Returns the bytes of all files under a path."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
