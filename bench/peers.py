"""Other ways to run a model: the plain one, and those for models that are larger than memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.data import Data, empty_weights
from bench.models import model_ctor


@dataclass(frozen=True)
class Peer:
    """A system that litrt is compared with.

    Attributes:
        title: Its name in tables.
        label: Its name in pictures.
        package: What has to be installed, as it is imported.
        load: Returns a model that is ready to be called.
        dtypes: Dtypes that it works in; empty for all.
    """

    title: str
    label: str
    package: str
    load: Callable[[Data], Any]
    dtypes: tuple[str, ...] = ()

    def missing(self, dtype: str) -> str | None:
        """Says why it cannot be measured, or returns None where it can."""
        if self.dtypes and dtype not in self.dtypes:
            return f"works in {' and '.join(self.dtypes)} only"
        if importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return None


def _state(data: Data) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    state: dict[str, torch.Tensor] = load_file(data.safetensors)
    return state


def _assigned(data: Data, state: dict[str, torch.Tensor]) -> nn.Module:
    with empty_weights():
        model = model_ctor(data.spec)()
    model.load_state_dict(state, assign=True)
    return model


def load_plain(data: Data) -> Any:
    """Loads all weights into memory."""
    return _assigned(data, {name: values.clone() for name, values in _state(data).items()})


def load_mapped(data: Data) -> Any:
    """Maps the weights from their file, with the page cache as the only cache."""
    return _assigned(data, _state(data))


def load_accelerate(data: Data) -> Any:
    """Has every weight in a memory-mapped file of its own, copied when its module is called."""
    from accelerate import disk_offload

    with empty_weights():
        model = model_ctor(data.spec)()
    return disk_offload(model, str(data.folder / "accelerate"), execution_device=torch.device("cpu"))


def load_pytorch_lit(data: Data) -> Any:
    """Has weights in memory-mapped files, loaded when their module is called."""
    from pytorch_lit import LitModule

    lit = LitModule.from_params(str(data.folder / "pytorch-lit"), model_ctor(data.spec), device="cpu")
    return lit.module  # its hooks are on the modules; `generate` is not forwarded


PEERS = {
    "pytorch-lit": Peer("PyTorch-LIT 0.1.7", "PyTorch-LIT", "pytorch_lit", load_pytorch_lit, ("float32",)),
    "accelerate": Peer("accelerate `disk_offload`", "accelerate disk_offload", "accelerate", load_accelerate),
    "safetensors-mmap": Peer("memory-mapped safetensors", "memory-mapped safetensors", "safetensors", load_mapped),
    "plain": Peer("plain model, no limit", "plain model", "torch", load_plain),
}
"""Those that can be measured, in the order of tables."""
