"""The models that are measured: their sizes, their constructors, and what goes into a pass."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import nn

Kind = Literal["gptj", "llama", "moe", "vit", "unet"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LANGUAGE: tuple[Kind, ...] = ("gptj", "llama", "moe")
NAMES = {
    "gptj": "GPT-J",
    "llama": "Llama",
    "moe": "Qwen3 mixture of experts",
    "vit": "ViT",
    "unet": "U-Net",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelSpec:
    """A model, up to the values of its weights.

    Attributes:
        kind: Its architecture.
        layers: Layers; for a U-Net residual blocks per level.
        width: Width; for a U-Net channels of the first level.
        heads: Attention heads; for a U-Net of the second level.
        kv_heads: Heads of keys and values.
        inner: Width between the two halves of a feed-forward, or of one expert.
        vocabulary: Rows of the embedding, or classes.
        experts: Experts per layer.
        active_experts: Experts that a token is routed to.
        image_size: Pixels per side.
        patch_size: Pixels per side of a patch.
        dtype: Dtype of the weights.
    """

    kind: Kind
    layers: int
    width: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    experts: int = 0
    active_experts: int = 0
    image_size: int = 0
    patch_size: int = 0
    dtype: str = field(default="float32", kw_only=True)

    @property
    def title(self) -> str:
        """A name for people."""
        return f"{NAMES[self.kind]}, {self.layers} {'layers' if self.kind != 'unet' else 'blocks per level'}"

    @property
    def key(self) -> str:
        """A name for files: equal for equal models, and no others."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{self.kind}-{self.layers}x{self.width}-{self.dtype}-{digest[:8]}"


_DEFAULTS: dict[Kind, dict[str, int]] = {
    "gptj": {"layers": 8, "width": 4096, "vocabulary": 50_400},
    "llama": {"layers": 8, "width": 4096, "vocabulary": 128_256},
    "moe": {"layers": 8, "width": 2048, "vocabulary": 32_000, "experts": 64, "active_experts": 4},
    "vit": {"layers": 24, "width": 1024, "vocabulary": 1_000, "image_size": 224, "patch_size": 16},
    "unet": {"layers": 2, "width": 320, "vocabulary": 0, "image_size": 64},
}
_HEAD_WIDTH: dict[Kind, int] = {"gptj": 256, "llama": 128, "moe": 128, "vit": 64, "unet": 64}
_INNER: dict[Kind, float] = {"gptj": 4, "llama": 3.5, "moe": 0.375, "vit": 4, "unet": 0}
_SIZES = {
    "layers": "layers; for a U-Net residual blocks per level",
    "width": "width; for a U-Net channels of the first level, a multiple of 8",
    "heads": "attention heads",
    "kv_heads": "heads of keys and values (llama, moe)",
    "inner": "width inside a feed-forward, or inside one expert",
    "vocabulary": "rows of the embedding, or classes of a ViT",
    "experts": "experts per layer (moe)",
    "active_experts": "experts per token (moe)",
    "image_size": "pixels per side (vit, unet)",
    "patch_size": "pixels per side of a patch (vit)",
}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `spec_of` reads."""
    parser.add_argument("--model", choices=KINDS, default="gptj")
    for name, what in _SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=what)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")


def spec_of(arguments: argparse.Namespace) -> ModelSpec:
    """Returns the model that the options of `add_model_arguments` ask for; the rest is as in models of that kind."""
    kind: Kind = arguments.model
    sizes = dict(_DEFAULTS[kind])
    sizes |= {name: value for name in _SIZES if (value := getattr(arguments, name)) is not None}
    heads = sizes.setdefault("heads", max(sizes["width"] // _HEAD_WIDTH[kind], 1))
    sizes.setdefault("kv_heads", max(heads // 4, 1) if kind in ("llama", "moe") else heads)
    sizes.setdefault("inner", int(sizes["width"] * _INNER[kind]))
    return ModelSpec(kind, dtype=arguments.dtype, **sizes)


def model_ctor(spec: ModelSpec) -> Callable[[], nn.Module]:
    """Returns the constructor of a model, whose weights are in the dtype asked for."""

    def construct() -> nn.Module:
        before = torch.get_default_dtype()
        torch.set_default_dtype(DTYPES[spec.dtype])
        try:
            return _CONSTRUCTORS[spec.kind](spec).eval()
        finally:
            torch.set_default_dtype(before)

    return construct


def _gptj(spec: ModelSpec) -> nn.Module:
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(
        n_layer=spec.layers,
        n_embd=spec.width,
        n_head=spec.heads,
        n_inner=spec.inner,
        vocab_size=spec.vocabulary,
        rotary_dim=min(64, spec.width // spec.heads),
        bos_token_id=None,
        eos_token_id=None,
    )
    model: nn.Module = GPTJForCausalLM(config)
    return model


def _shared(spec: ModelSpec) -> dict[str, Any]:
    return {
        "num_hidden_layers": spec.layers,
        "hidden_size": spec.width,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.width // spec.heads,
        "vocab_size": spec.vocabulary,
    }


def _llama(spec: ModelSpec) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM(LlamaConfig(**_shared(spec), intermediate_size=spec.inner))
    return model


def _moe(spec: ModelSpec) -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **_shared(spec),
        num_experts=spec.experts,
        num_experts_per_tok=spec.active_experts,
        moe_intermediate_size=spec.inner,
    )
    model: nn.Module = Qwen3MoeForCausalLM(config)
    return model


def _vit(spec: ModelSpec) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        num_hidden_layers=spec.layers,
        hidden_size=spec.width,
        num_attention_heads=spec.heads,
        intermediate_size=spec.inner,
        image_size=spec.image_size,
        patch_size=spec.patch_size,
        num_labels=spec.vocabulary,
    )
    model: nn.Module = ViTForImageClassification(config)
    return model


def _unet(spec: ModelSpec) -> nn.Module:
    from bench.unet import UNet

    return UNet(spec.width, spec.layers, _HEAD_WIDTH["unet"])


_CONSTRUCTORS: dict[Kind, Callable[[ModelSpec], nn.Module]] = {
    "gptj": _gptj,
    "llama": _llama,
    "moe": _moe,
    "vit": _vit,
    "unet": _unet,
}


def inputs(spec: ModelSpec, batch: int, n_tokens: int) -> dict[str, torch.Tensor]:
    """Returns what goes into a pass: always the same."""
    generator = torch.Generator().manual_seed(0)
    if spec.kind in LANGUAGE:
        return {"input_ids": torch.randint(0, spec.vocabulary, (batch, n_tokens), generator=generator)}
    channels = 3 if spec.kind == "vit" else 4
    pixels = torch.randn(batch, channels, spec.image_size, spec.image_size, generator=generator)
    pixels = pixels.to(DTYPES[spec.dtype])
    if spec.kind == "vit":
        return {"pixel_values": pixels}
    return {"sample": pixels, "timestep": torch.full((batch,), 500)}
