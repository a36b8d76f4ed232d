"""What the two GPT-J examples share: where the model and its store come from."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GPTJConfig, GPTJForCausalLM

import litrt


class RandomWeights(Mapping[str, torch.Tensor]):
    """Weights of a model, each made when it is asked for, so that a model of any size can be converted."""

    def __init__(self, model_ctor: Callable[[], nn.Module]) -> None:
        with torch.device("meta"):
            self._metas = model_ctor().state_dict()

    def __getitem__(self, name: str) -> torch.Tensor:
        meta = self._metas[name]
        seed = sum(name.encode()) * len(name)
        values = torch.empty(meta.shape, dtype=meta.dtype)
        return values.normal_(0, 0.02, generator=torch.Generator().manual_seed(seed))

    def __iter__(self) -> Iterator[str]:
        return iter(self._metas)

    def __len__(self) -> int:
        return len(self._metas)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what says which model, which store and which budget."""
    parser.add_argument("--checkpoint", type=Path, help="a GPT-J checkpoint; without it, random weights")
    parser.add_argument("--store", type=Path, help="keep the store here, and use it when it is there")
    parser.add_argument("--folder", type=Path, default=None, help="where a store that is not kept goes (default: /tmp)")
    parser.add_argument("--budget", default="40%", help="bytes of weights to hold (default: 40%%)")
    parser.add_argument("--layers", type=int, default=28, help="layers of the random model (default: 28)")
    parser.add_argument("--width", type=int, default=4096, help="width of the random model (default: 4096)")


def open_model(arguments: argparse.Namespace, folder: Path) -> tuple[Callable[[], nn.Module], Path, Any]:
    """Returns a constructor, the path of a store of its weights, and a tokenizer where there is one."""
    if arguments.checkpoint is not None:
        config = AutoConfig.from_pretrained(arguments.checkpoint)
        tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    else:
        n_heads = max(arguments.width // 256, 1)
        rotary_dim = min(64, arguments.width // n_heads)
        config = GPTJConfig(
            n_layer=arguments.layers, n_embd=arguments.width, n_head=n_heads, rotary_dim=rotary_dim, eos_token_id=None
        )
        tokenizer = None

    def model_ctor() -> nn.Module:
        model: nn.Module = GPTJForCausalLM(config)
        return model

    store = arguments.store or folder / "gptj.zarr"
    if not store.exists():
        litrt.convert(arguments.checkpoint or RandomWeights(model_ctor), store)
    return model_ctor, store, tokenizer
