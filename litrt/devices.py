"""Devices by name."""

from __future__ import annotations

import torch

from litrt.cuda import CudaDevice
from litrt.device import CpuDevice, Device
from litrt.errors import DeviceError


def open_device(device: str | torch.device) -> Device:
    """Returns the device of that name.

    Raises:
        DeviceError: If litrt cannot serve weights there.
    """
    try:
        torch_device = torch.device(device)
    except RuntimeError as error:
        raise DeviceError(f"device {device!r} is none that torch knows ({error}): use 'cpu' or 'cuda'.") from None
    if torch_device.type == "cpu":
        return CpuDevice()
    if torch_device.type == "cuda":
        return CudaDevice(torch_device)
    raise DeviceError(f"device {str(device)!r} is not supported: litrt serves weights on 'cpu' and 'cuda'.")
