"""Where weights are computed with: the memory they are served from, and tensors over that memory.

All that differs between devices is behind `Device`; the plan, the arena and the pipeline are the same for all.
"""

from __future__ import annotations

import mmap
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from litrt.store import TensorInfo

Bytes = npt.NDArray[np.uint8]

HUGE_PAGE_BYTES = 2 << 20


class Device(Protocol):
    """A device that weights can be served on."""

    @property
    def torch_device(self) -> torch.device:
        """The device that placeholders report."""
        ...

    def allocate(self, n_bytes: int) -> Bytes:
        """Returns address space for `n_bytes`, of which only what is written to takes memory."""
        ...

    def tensor(self, memory: Bytes, info: TensorInfo) -> torch.Tensor:
        """Returns a tensor over `memory`, which it keeps alive, with a storage of its own."""
        ...


class CpuDevice:
    """Weights in anonymous huge pages of this process.

    Direct reads of large requests into huge pages take a hundredth of a second of CPU per GB; into small pages five
    times that, which is compute taken from the model.
    """

    torch_device = torch.device("cpu")

    def allocate(self, n_bytes: int) -> Bytes:
        """Returns address space aligned to huge pages; it is given back when its last view is gone."""
        mapping = mmap.mmap(-1, n_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            mapping.madvise(mmap.MADV_HUGEPAGE)
        whole = np.frombuffer(mapping, dtype=np.uint8)
        start = -whole.ctypes.data % HUGE_PAGE_BYTES
        return whole[start : start + n_bytes]

    def tensor(self, memory: Bytes, info: TensorInfo) -> torch.Tensor:
        """Returns a contiguous tensor of the shape and dtype of `info` over `memory`."""
        with torch.inference_mode(False), torch.no_grad():
            storage = torch.from_numpy(memory).untyped_storage()
            strides = []
            step = 1
            for extent in reversed(info.shape):
                strides.append(step)
                step *= max(extent, 1)
            return torch.empty(0, dtype=info.dtype).set_(storage, 0, info.shape, tuple(reversed(strides)))


def open_device(device: str | torch.device) -> Device:
    """Returns the device of that name.

    Raises:
        ValueError: If litrt cannot serve weights there.
    """
    torch_device = torch.device(device)
    if torch_device.type == "cpu":
        return CpuDevice()
    raise ValueError(f"device {str(device)!r} is not supported: this version of litrt serves weights on 'cpu' only.")
