"""Run PyTorch models larger than memory, inside a byte budget that you choose, bit-identical to the plain model.

import litrt

litrt.convert("model.safetensors", "model.zarr")
with litrt.Runtime(model_ctor, "model.zarr", budget="6GB") as rt:
    rt.warmup(sample_input)
    y = rt(x)
"""

from litrt.convert import convert
from litrt.errors import (
    BudgetError,
    ClosedError,
    CorruptWeightError,
    DeviceError,
    LitrtError,
    SkeletonError,
    StalledReadError,
    StoreChangedError,
    StoreError,
    TraceMismatchError,
    WeightNotFoundError,
    WeightWriteError,
)
from litrt.export import export
from litrt.lazy import LazyStateDict, lazy_state_dict
from litrt.plan import Plan
from litrt.repair import repair
from litrt.runtime import Runtime
from litrt.shared import SharedBudget
from litrt.stats import Stats
from litrt.store import Store, open_store
from litrt.tensors import TensorInfo
from litrt.verify import verify

__all__ = [
    "BudgetError",
    "ClosedError",
    "CorruptWeightError",
    "DeviceError",
    "LazyStateDict",
    "LitrtError",
    "Plan",
    "Runtime",
    "SharedBudget",
    "SkeletonError",
    "StalledReadError",
    "Stats",
    "Store",
    "StoreChangedError",
    "StoreError",
    "TensorInfo",
    "TraceMismatchError",
    "WeightNotFoundError",
    "WeightWriteError",
    "convert",
    "export",
    "lazy_state_dict",
    "open_store",
    "repair",
    "verify",
]
