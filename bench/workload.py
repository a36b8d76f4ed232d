"""What is timed: a pass, the decoding of one token, or a generation."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch

from bench.models import LANGUAGE, ModelSpec, inputs

Mode = Literal["pass", "decode", "generate"]
MODES: tuple[Mode, ...] = get_args(Mode)


class Workload:
    """One of the modes, for one model, on inputs that are always the same.

    Args:
        spec: The model.
        mode: "pass" for one forward; "decode" for one more token after `n_tokens`, whose keys and values are cached;
            "generate" for `n_tokens` and then `n_new` more.
        batch: Sequences, or images.
        n_tokens: Tokens per sequence, of language models.
        n_new: Tokens to generate.
    """

    def __init__(self, spec: ModelSpec, mode: Mode, batch: int, n_tokens: int, n_new: int) -> None:
        if mode != "pass" and spec.kind not in LANGUAGE:
            raise ValueError(f"mode {mode!r} needs a language model, and {spec.kind!r} is none: use 'pass'.")
        self.mode = mode
        self._is_language = spec.kind in LANGUAGE
        self._n_new = n_new
        self._inputs = inputs(spec, batch, n_tokens)
        self._filled: dict[str, Any] = {}

    @property
    def n_forwards(self) -> int:
        """Forwards of the model that are timed as one."""
        return self._n_new if self.mode == "generate" else 1

    def fill(self, model: Callable[..., Any]) -> None:
        """Fills the cache of keys and values, where decoding needs it."""
        if self.mode == "decode":
            output = model(**self._inputs, use_cache=True)
            # Versions of transformers call it one or the other, in what they take and in what they return.
            name = "cache" if "cache" in output else "past_key_values"
            self._filled = {name: output[name]}

    def arguments(self) -> dict[str, Any]:
        """Returns what a single forward is called with. A cache of keys and values grows in it: ask anew every time."""
        if not self._is_language:
            return dict(self._inputs)
        if self.mode == "decode":
            last = self._inputs["input_ids"][:, -1:]
            return {"input_ids": last, "use_cache": True, **copy.deepcopy(self._filled)}
        return {**self._inputs, "use_cache": self.mode == "generate"}

    def ready(self, model: Any) -> Callable[[], torch.Tensor]:
        """Returns what is to be timed once."""
        if self.mode == "generate":
            return lambda: self._generated(model)
        arguments = self.arguments()

        def forward() -> torch.Tensor:
            output = model(**arguments)
            values: torch.Tensor = output if isinstance(output, torch.Tensor) else output.logits
            return values

        return forward

    def _generated(self, model: Any) -> torch.Tensor:
        ids = self._inputs["input_ids"]
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self._n_new,
            min_new_tokens=self._n_new,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return torch.stack(output.logits, dim=1)


def digest(values: torch.Tensor) -> str:
    """Returns the hash of the bits of a tensor."""
    return hashlib.sha256(values.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
