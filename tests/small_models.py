"""Small random models of the transformers package, with fixed sizes, for what is done with a model beside passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from corpus.case import seeded
from torch import nn

Inputs = dict[str, torch.Tensor]

_VOCABULARY = 99

_N_SEQUENCES = 2

_N_TOKENS = 12


@dataclass(frozen=True, eq=False)
class Case:
    """One architecture, small enough to run whole.

    Attributes:
        name: The model type, as transformers spells it in a config.
        construct: Builds the model as a user would: random weights, no seed, in training mode.
        inputs: Makes the keyword arguments of a forward, the same values at every call.
    """

    name: str
    construct: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]

    def build(self) -> nn.Module:
        """Constructs the model in evaluation mode, with the same weights at every call."""
        with seeded():
            return self.construct().eval()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def _ids(n_tokens: int = _N_TOKENS) -> torch.Tensor:
    # The ids below 5 are left to padding and the other special tokens.
    return torch.randint(5, _VOCABULARY, (_N_SEQUENCES, n_tokens), generator=_generator())


def _tokens(n_tokens: int = _N_TOKENS) -> Inputs:
    """Two sequences, the second one padded on the right, as batches of text are."""
    attention_mask = torch.ones(_N_SEQUENCES, n_tokens, dtype=torch.long)
    attention_mask[1, -3:] = 0
    return {"input_ids": _ids(n_tokens), "attention_mask": attention_mask}


def _tokens_and_decoder() -> Inputs:
    return {**_tokens(), "decoder_input_ids": _ids(7)}


def _pixels(side: int = 32) -> Inputs:
    return {"pixel_values": torch.randn(_N_SEQUENCES, 3, side, side, generator=_generator())}


def _tokens_and_pixels() -> Inputs:
    return {**_tokens(), **_pixels()}


def _tokens_around_images(n_patches: int = 16, image_token: int = 4) -> Inputs:
    """Text in which a run of image tokens stands for the patches of one image."""
    text = _ids()
    image = torch.full((_N_SEQUENCES, n_patches), image_token)
    return {"input_ids": torch.cat([text[:, :3], image, text[:, 3:]], dim=1), **_pixels()}


def _spectrogram(n_frames: int, n_bins: int, name: str = "input_features") -> Inputs:
    return {name: torch.randn(_N_SEQUENCES, n_frames, n_bins, generator=_generator())}


def _spectrogram_and_decoder(n_frames: int, n_bins: int) -> Inputs:
    return {**_spectrogram(n_frames, n_bins), "decoder_input_ids": _ids(7)}


# At the usual 0.02 the signal of so narrow a model dies out: some convolutional ones would return only zeros.
_LIVELY: dict[str, Any] = {"initializer_range": 0.2, "init_std": 0.2, "layer_scale_init_value": 0.5}

_SMALL: dict[str, Any] = {
    **_LIVELY,
    "vocab_size": _VOCABULARY,
    "hidden_size": 32,
    "embedding_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 3,
    "sep_token_id": 4,
    "mask_token_id": 4,
}

_SMALL_ENCODER_DECODER: dict[str, Any] = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 2,
}

_SMALL_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

_SMALL_VISION: dict[str, Any] = {"image_size": 32, "patch_size": 8}

_SMALL_AUDIO: dict[str, Any] = {
    "conv_dim": (32, 32, 32),
    "conv_stride": (5, 4, 2),
    "conv_kernel": (10, 4, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}


def _construct(architecture: str, defaults: dict[str, Any], config: dict[str, Any]) -> nn.Module:
    import transformers

    model_class = getattr(transformers, architecture)
    config_class = model_class.config_class
    known = {*config_class.__dataclass_fields__, *config_class.attribute_map, "num_labels"}
    if unknown := config.keys() - known:
        # A config keeps any name that it is given, so a misspelt size would leave a model of full size.
        raise TypeError(f"{config_class.__name__} has no field {sorted(unknown)}, given for {architecture}.")
    fitting = {name: value for name, value in defaults.items() if name in known}
    model: nn.Module = model_class(config_class(**{**fitting, **config}))
    return model


def _case(
    defaults: dict[str, Any],
    default_inputs: Callable[[], Inputs],
    name: str,
    architecture: str,
    inputs: Callable[[], Inputs] | None = None,
    **config: Any,
) -> Case:
    """Makes one row of the table: `config` replaces the sizes that the family's defaults give."""
    return Case(name, partial(_construct, architecture, defaults, config), inputs or default_inputs)


_decoder = partial(_case, _SMALL, _tokens)

_encoder = partial(_case, _SMALL, _tokens)

_encoder_decoder = partial(_case, _SMALL | _SMALL_ENCODER_DECODER, _tokens_and_decoder)

_experts = partial(_case, _SMALL | _SMALL_EXPERTS, _tokens)

_vision = partial(_case, _SMALL | _SMALL_VISION, _pixels)

_multimodal = partial(_case, _SMALL, _tokens_and_pixels)

_speech_to_text = partial(
    _case, _SMALL | _SMALL_AUDIO | _SMALL_ENCODER_DECODER, partial(_spectrogram_and_decoder, 32, 16)
)

_SMALL_TOWER: dict[str, Any] = {
    "initializer_range": 0.2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}

_TEXT_TOWER = _SMALL_TOWER | {
    "vocab_size": _VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_VISION_TOWER = _SMALL_TOWER | _SMALL_VISION

CASES = {
    case.name: case
    for case in (
        _decoder("gptj", "GPTJForCausalLM", rotary_dim=4),
        _decoder("llama", "LlamaForCausalLM"),
        _encoder("bert", "BertForMaskedLM"),
        _encoder_decoder("bart", "BartForConditionalGeneration"),
        _encoder_decoder("t5", "T5ForConditionalGeneration"),
        _experts("mixtral", "MixtralForCausalLM"),
        _vision("vit", "ViTForImageClassification"),
        _multimodal(
            "llava",
            "LlavaForConditionalGeneration",
            inputs=_tokens_around_images,
            image_token_index=4,
            image_seq_length=16,
            text_config=_TEXT_TOWER | {"model_type": "llama"},
            vision_config=_VISION_TOWER | {"model_type": "clip_vision_model"},
        ),
        _speech_to_text(
            "whisper",
            "WhisperForConditionalGeneration",
            inputs=partial(_spectrogram_and_decoder, 16, 64),
            num_mel_bins=16,
            max_source_positions=32,
            max_target_positions=32,
        ),
    )
}
