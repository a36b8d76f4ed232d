"""The models of the diffusers package, made small by their constructors' defaults."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from corpus.case import Case, Inputs, NotBuilt, outputs, seeded
from corpus.shrink import Shrinking, Sizes, shrunk_fields

MOST_BYTES = 24 << 20
"""Weights of a model that counts as small."""

_SIZES = (Sizes(width=64), Sizes(width=64, unknown=False), Sizes(width=64, unknown=False, lists=False))

_TEXT_WIDTHS = (
    "joint_attention_dim",
    "cross_attention_dim",
    "text_embed_dim",
    "caption_channels",
    "text_dim",
    "encoder_hid_dim",
    "caption_feat_dim",
    "text_in_dim",
    "cap_feat_dim",
    "in_cross_dim",
    "txt_in_features",
)
_N_WORDS = 7


def classes() -> list[str]:
    """Returns the names of the models of diffusers, without importing any of them."""
    import diffusers

    return sorted(set(diffusers._import_structure["models"]))


def case_of(name: str) -> Case:
    """Returns a model as a case.

    Raises:
        NotBuilt: If no sizes or no inputs are found with which it runs.
    """
    import diffusers

    try:
        kind = getattr(diffusers, name)
    except Exception as error:
        raise NotBuilt(f"it is not imported: {' '.join(str(error).split())[:160]}") from None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)) or kind is diffusers.ModelMixin:
        raise NotBuilt("not a model by itself")
    reasons = []
    for sizes in _SIZES:
        arguments = _arguments(kind, sizes)
        construct = functools.partial(kind, **arguments)
        try:
            with torch.device("meta"):
                n_bytes = sum(weight.nbytes for weight in construct().parameters())
            if n_bytes > MOST_BYTES:
                raise NotBuilt(f"{n_bytes / 1e6:.0f} MB of weights")
            with seeded():
                model = construct().eval()
        except Exception as error:
            reasons.append(f"constructor: {type(error).__name__}: {error}")
            continue
        known = {**{p.name: p.default for p in inspect.signature(kind.__init__).parameters.values()}, **arguments}
        for n_dimensions, channels in _layouts(known):
            made = [_inputs(model, known, n_dimensions, channels, number) for number in (0, 1)]
            try:
                with torch.no_grad(), seeded():
                    y = outputs(model(**made[0]))
                    model(**made[1])
                if not any(tensor.isfinite().any() for tensor in y):
                    raise NotBuilt("what the plain model returns is not finite")
            except Exception as error:
                reasons.append(f"forward: {type(error).__name__}: {error}")
                continue
            return Case(name, "diffusers", construct, made.__getitem__)
    raise NotBuilt(" ".join(max(reasons, key=reasons.count).split())[:200])


def _arguments(kind: type[nn.Module], sizes: Sizes) -> dict[str, Any]:
    defaults = {
        parameter.name: parameter.default
        for parameter in list(inspect.signature(kind.__init__).parameters.values())[1:]
        if parameter.default is not parameter.empty
    }
    arguments = shrunk_fields(defaults, sizes, Shrinking(sizes, {}))
    for name, value in defaults.items():
        if name.startswith(("axes_dim", "rope_axes")) and isinstance(value, list | tuple):
            part = sizes.head_dim // len(value) // 2 * 2
            arguments[name] = (sizes.head_dim - part * (len(value) - 1), *[part] * (len(value) - 1))
        elif name in ("in_channels", "out_channels", "latent_channels") and isinstance(value, int):
            arguments[name] = min(value, 16)
        elif name.startswith("num_") and name.endswith("single_layers"):
            arguments[name] = min(value, 2)
    return arguments


def _layouts(known: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Yields how many dimensions a latent may have, and how many channels."""
    n_channels = [
        known[name] for name in ("in_channels", "latent_channels", "z_dim") if isinstance(known.get(name), int)
    ]
    for channels in dict.fromkeys([*n_channels, 3]):
        for n_dimensions in (4, 5, 3):
            yield n_dimensions, channels


def _inputs(model: nn.Module, known: dict[str, Any], n_dimensions: int, channels: int, number: int) -> Inputs:
    n = 2 + number
    generator = torch.Generator().manual_seed(1 + number)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    size = known.get("sample_size")
    side = size if isinstance(size, int) and size <= 64 else 32
    shape = {4: (n, channels, side, side), 5: (n, channels, 5, side, side), 3: (n, 16, channels)}[n_dimensions]
    n_tokens = 16 if n_dimensions == 3 else math.prod(shape[2:]) // 4
    width = next((known[name] for name in _TEXT_WIDTHS if isinstance(known.get(name), int)), 64)
    axes = len(known.get("axes_dims_rope") or known.get("axes_dim") or (0, 0, 0))
    made = {
        "sample": lambda: noise(*shape),
        "hidden_states": lambda: noise(*shape),
        "x": lambda: noise(*shape),
        "controlnet_cond": lambda: noise(n, 3, side * 8, side * 8),
        "timestep": lambda: torch.full((n,), 10),
        "timesteps": lambda: torch.full((n,), 10),
        "encoder_hidden_states": lambda: noise(n, _N_WORDS, width),
        "encoder_attention_mask": lambda: torch.ones(n, _N_WORDS, dtype=torch.bool),
        "encoder_hidden_states_mask": lambda: torch.ones(n, _N_WORDS, dtype=torch.long),
        "pooled_projections": lambda: noise(n, known.get("pooled_projection_dim") or 64),
        "guidance": lambda: torch.ones(n),
        "img_ids": lambda: torch.zeros(n_tokens, axes),
        "txt_ids": lambda: torch.zeros(_N_WORDS, axes),
        "img_shapes": lambda: [[(1, 4, 4)]] * n,
        "original_size": lambda: torch.full((n, 2), 32.0),
        "target_size": lambda: torch.full((n, 2), 32.0),
        "crop_coords": lambda: torch.zeros(n, 2),
        "proj_embedding": lambda: noise(n, known.get("embedding_dim") or 64),
    }
    parameters = inspect.signature(model.forward).parameters
    optional = {"timestep", "encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids", "guidance"}
    inputs: Inputs = {}
    for name, parameter in parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name in made and (parameter.default is parameter.empty or name in optional):
            inputs[name] = made[name]()
        elif parameter.default is parameter.empty:
            raise NotBuilt(f"no rule for its input {name!r}")
    return inputs
