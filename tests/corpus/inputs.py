"""Makes inputs for a model of transformers from the signature of its forward and its config."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from corpus.case import Inputs, NotBuilt
from corpus.hints import Hints
from corpus.shrink import FIRST_WORD, N_WORDS, is_config


def find(config: Any, *names: str, default: Any = None) -> Any:
    """Returns the first of the names that a config has, or one of its parts, from the outside in."""
    level = [config]
    while level:
        for part in level:
            for name in names:
                value = getattr(part, name, None)
                if value is not None:
                    return value
        level = [value for part in level for value in vars(part).values() if is_config(value)]
    return default


def _side(value: Any) -> tuple[int, int]:
    if isinstance(value, dict):
        value = [value.get("height", 32), value.get("width", 32)]
    return (value, value) if isinstance(value, int) else (int(value[-2]), int(value[-1]))


class _Maker:
    """Makes the arguments of one call."""

    def __init__(self, model: nn.Module, hints: Hints) -> None:
        self.config: Any = model.config
        self.hints = hints
        self.model = model
        self.given: Inputs = {}
        self.generator = torch.Generator().manual_seed(1 + hints.n_sequences)

    def noise(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    @property
    def n(self) -> int:
        return self.hints.n_sequences

    @property
    def vision(self) -> Any:
        return find(self.config, "vision_config", "backbone_config") or self.config

    @property
    def image(self) -> tuple[int, int]:
        if self.hints.image:
            return self.hints.image, self.hints.image
        return _side(find(self.config, "image_size", "img_size", default=32))

    @property
    def channels(self) -> int:
        return self.hints.channels or find(self.config, "num_channels", "in_channels", "in_chans", default=3)

    def words(self, n_tokens: int | None = None, n_sequences: int | None = None) -> torch.Tensor:
        low = min(FIRST_WORD, max(find(self.config, "vocab_size", default=FIRST_WORD + N_WORDS) - N_WORDS, 2))
        high = min(FIRST_WORD + N_WORDS, find(self.config, "vocab_size", default=FIRST_WORD + N_WORDS))
        return torch.randint(
            low, max(high, low + 1), (n_sequences or self.n, n_tokens or self.hints.n_tokens), generator=self.generator
        )

    # Texts.

    def input_ids(self) -> torch.Tensor:
        ids = self.words()
        if self.hints.n_placeholders:
            token = find(
                self.config,
                "image_token_id",
                "image_token_index",
                "im_patch_id",
                "audio_token_id",
                "audio_token_index",
                "speech_token_id",
                "boi_token_id",
                "media_token_id",
                "image_patch_id",
                "video_token_id",
                default=4,
            )
            if getattr(self, "video", False):
                token = find(self.config, "video_token_id", "video_token_index", default=token)
            run = torch.full((self.n, self.hints.n_placeholders), token)
            begin = find(self.config, "vision_start_token_id")
            before = [torch.full((self.n, 1), begin)] if isinstance(begin, int) else []
            ids = torch.cat([ids[:, :3], *before, run, ids[:, 3:]], 1)
        if (eos := getattr(self.config, "eos_token_id", None)) is not None and "ForSequenceClass" in type(
            self.model
        ).__name__:
            ids[:, -1] = eos if isinstance(eos, int) else eos[0]
        return ids

    def attention_mask(self) -> torch.Tensor:
        if "input_ids" in self.given:
            mask = torch.ones(self.given["input_ids"].shape[:2], dtype=torch.long)
            if self.hints.n_tokens > 4:
                mask[-1, -2:] = 0
            return mask
        features = self.given.get("input_features", self.given.get("input_values"))
        if features is None:
            raise KeyError
        return torch.ones(features.shape[0], features.shape[-1], dtype=torch.long)

    def decoder_input_ids(self) -> torch.Tensor:
        books = find(self.config, "num_codebooks", "num_channels") if not hasattr(self.config, "vocab_size") else None
        if "input_ids" in self.given or books is None:
            return self.words(7)
        return self.words(7)

    def bbox(self) -> torch.Tensor:
        corners = torch.randint(0, 50, (*self.given["input_ids"].shape, 2), generator=self.generator)
        return torch.cat([corners, corners + 9], dim=-1)

    def token_types(self) -> torch.Tensor:
        image = find(self.config, "image_token_id", "image_token_index", default=-1)
        return (self.given["input_ids"] == image).long()

    # Images.

    def pixel_values(self) -> torch.Tensor:
        if (
            self.has("image_grid_thw")
            or self.has("spatial_shapes")
            or self.has("pixel_position_ids")
            or self.has("image_position_ids")
        ):
            return self.patches()
        if self.has("aspect_ratio_ids") or (self.has("image_sizes") and "next" in type(self.model).__name__.lower()):
            tiles = find(self.config, "max_num_tiles", default=4)
            return (
                self.noise(self.n, 1, tiles, self.channels, *self.image)
                if self.has("aspect_ratio_ids")
                else self.noise(self.n, 3, self.channels, *self.image)
            )
        if self.has("pixel_attention_mask") or self.has("image_attention_mask"):
            return self.noise(self.n, 1, self.channels, *self.image)
        frames = find(self.config, "num_frames", "frames_per_clip")
        kind = type(self.model).__name__
        if re.search("Video|VJEPA|Vivit|Timesformer|XCLIP|TimeSformer", kind) and frames:
            return self.noise(self.n, frames, self.channels, *self.image)
        return self.noise(self.n, self.channels, *self.image)

    def patches(self) -> torch.Tensor:
        patch = _side(find(self.vision, "patch_size", "spatial_patch_size", default=8))[0]
        temporal = find(self.vision, "temporal_patch_size", default=1)
        width = self.channels * temporal * patch * patch
        if self.has("spatial_shapes") or self.has("pixel_position_ids") or self.has("image_position_ids"):
            return self.noise(self.n, 16, width)
        return self.noise(self.n * 16, width)

    def videos(self) -> torch.Tensor:
        return self.noise(self.n, find(self.config, "num_frames", default=4), self.channels, *self.image)

    def grid(self) -> torch.Tensor:
        return torch.tensor([[1, 4, 4]] * self.n)

    def positions(self) -> torch.Tensor:
        return (
            torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1)
            .view(1, 16, 2)
            .expand(self.n, -1, -1)
        )

    def hidden_states(self) -> torch.Tensor:
        if self.has("grid_thw"):
            return self.patches()
        width = find(self.config, "hidden_size", "d_model", default=32)
        return self.noise(self.n, self.hints.n_tokens, width)

    # Sounds.

    @property
    def bins(self) -> int:
        names = (
            "num_mel_bins",
            "n_mels",
            "input_feat_per_channel",
            "feature_projection_input_dim",
            "mel_bins",
            "num_mels",
            "feature_size",
            "input_dim",
            "input_feat_size",
        )
        return (
            find(self.config, "audio_config", default=None)
            and find(
                self.config.audio_config if hasattr(self.config, "audio_config") else self.config, *names, default=16
            )
        ) or find(self.config, *names, default=16)

    def input_features(self) -> torch.Tensor:
        frames = self.hints.n_frames or 2 * find(self.config, "max_source_positions", default=32)
        frames = min(frames, 3000)
        if self.channels_first:
            return self.noise(self.n, self.bins, frames)
        return self.noise(self.n, frames, self.bins)

    @property
    def channels_first(self) -> bool:
        return getattr(self.hints, "channels", None) == -1 or bool(
            re.search(
                "Whisper|Qwen2Audio|Qwen2_5Omni|Voxtral|AudioFlamingo|Kyutai|Qwen3Omni|Glm", type(self.model).__name__
            )
        )

    def input_values(self) -> torch.Tensor:
        kind = type(self.model).__name__
        samples = 100 * (self.hints.n_frames or 24)
        if re.search("^AST|Spectrogram", kind):
            return self.noise(self.n, find(self.config, "max_length", default=32), self.bins)
        if self.hints.channels == -2 or hasattr(self.config, "codebook_size") or hasattr(self.config, "audio_channels"):
            return self.noise(self.n, 1, samples)
        return self.noise(self.n, samples)

    # Series.

    def past_values(self) -> torch.Tensor:
        channels = find(self.config, "num_input_channels", default=0)
        length = find(self.config, "context_length", default=32)
        lags = max(find(self.config, "lags_sequence", default=[0]) or [0])
        shape = (self.n, length + lags, channels) if channels else (self.n, length + lags)
        return self.noise(*shape)

    def has(self, name: str) -> bool:
        return name in self.parameters and name not in self.hints.without

    def make(self) -> Inputs:
        parameters = inspect.signature(self.model.forward).parameters
        self.parameters = parameters
        main = getattr(self.model, "main_input_name", None)
        for name, maker in MAKERS.items():
            parameter = parameters.get(name)
            if parameter is None or name in self.hints.without:
                continue
            required = parameter.default is parameter.empty or name == main or name in self.hints.also
            if required or name in _WANTED or (name in _WITH and _WITH[name] & self.given.keys()):
                if not required and name in _WANTED and _WANTED[name] & self.given.keys():
                    continue
                try:
                    self.given[name] = maker(self)
                except KeyError:
                    if required:
                        raise NotBuilt(f"no rule for its input {name!r} alone") from None
        missing = [
            name
            for name, parameter in parameters.items()
            if parameter.default is parameter.empty
            and name not in self.given
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        ]
        if missing:
            raise NotBuilt(f"no rule for its inputs {missing}")
        if not self.given:
            raise NotBuilt(f"no rule for any of its inputs {list(parameters)}")
        return self.given


def _ones_like_images(m: _Maker) -> torch.Tensor:
    shape = m.given["pixel_values"].shape
    return torch.ones(
        *(shape[:-3] if len(shape) > 3 else shape[:2]), *(shape[-2:] if len(shape) > 3 else ()), dtype=torch.long
    )


def _series_features(m: _Maker, which: str) -> torch.Tensor:
    length = m.given["past_values"].shape[1] if which == "past" else find(m.config, "prediction_length", default=8)
    n = find(m.config, "num_time_features", default=0) + 0
    return m.noise(m.n, length, max(n, 0)) if n else torch.zeros(m.n, length, 0)


MAKERS: dict[str, Callable[[_Maker], Any]] = {
    "input_ids": _Maker.input_ids,
    "input_features": _Maker.input_features,
    "input_values": _Maker.input_values,
    "pixel_values": _Maker.pixel_values,
    "pixel_values_videos": _Maker.videos,
    "past_values": _Maker.past_values,
    "hidden_states": _Maker.hidden_states,
    "attention_mask": _Maker.attention_mask,
    "decoder_input_ids": _Maker.decoder_input_ids,
    "bbox": _Maker.bbox,
    "mm_token_type_ids": _Maker.token_types,
    "image_grid_thw": _Maker.grid,
    "grid_thw": _Maker.grid,
    "image_sizes": lambda m: torch.tensor([list(m.image)] * m.n),
    "target_sizes": lambda m: torch.tensor([list(m.image)] * m.n),
    "pixel_attention_mask": _ones_like_images,
    "pixel_position_ids": _Maker.positions,
    "image_position_ids": _Maker.positions,
    "spatial_shapes": lambda m: torch.tensor([[4, 4]] * m.n),
    "aspect_ratio_ids": lambda m: torch.ones(m.n, 1, dtype=torch.long),
    "aspect_ratio_mask": lambda m: torch.ones(m.n, 1, find(m.config, "max_num_tiles", default=4), dtype=torch.long),
    "cross_attention_mask": lambda m: torch.ones(
        m.n, m.given["input_ids"].shape[1], 1, find(m.config, "max_num_tiles", default=4), dtype=torch.long
    ),
    "image_attention_mask": lambda m: torch.ones(m.n, m.given["input_ids"].shape[1], 1, dtype=torch.long),
    "qformer_input_ids": lambda m: m.words(),
    "input_features_mask": lambda m: (
        torch.ones(m.given["input_features"].shape[:2], dtype=torch.bool)
        if not m.channels_first
        else torch.ones(m.n, m.given["input_features"].shape[2], dtype=torch.bool)
    ),
    "feature_attention_mask": lambda m: torch.ones(m.n, m.given["input_features"].shape[-1], dtype=torch.long),
    "visual_feats": lambda m: m.noise(m.n, 5, find(m.config, "visual_feat_dim", default=32)),
    "visual_pos": lambda m: m.noise(m.n, 5, 4).abs(),
    "visual_embeds": lambda m: m.noise(m.n, 5, find(m.config, "visual_embedding_dim", default=32)),
    "entity_ids": lambda m: torch.randint(1, 16, (m.n, 2), generator=m.generator),
    "entity_position_ids": lambda m: torch.tensor([[[0, 1], [4, 5]]] * m.n),
    "global_attention_mask": lambda m: (
        (torch.arange(m.given["input_ids"].shape[1]) == 0).long().expand(m.n, -1).clone()
    ),
    "past_time_features": lambda m: _series_features(m, "past"),
    "past_observed_mask": lambda m: torch.ones_like(m.given["past_values"]),
    "future_time_features": lambda m: _series_features(m, "future"),
    "future_values": lambda m: m.noise(m.n, find(m.config, "prediction_length", default=8)),
    "past_values_padding": lambda m: torch.zeros(m.given["past_values"].shape[:2], dtype=torch.long),
    "freq": lambda m: torch.zeros(m.n, 1, dtype=torch.long),
    "spectrogram": lambda m: m.noise(m.n, 10, find(m.config, "model_in_dim", default=16)),
    "states": lambda m: m.noise(m.n, 6, m.config.state_dim),
    "actions": lambda m: m.noise(m.n, 6, m.config.act_dim),
    "rewards": lambda m: m.noise(m.n, 6, 1),
    "returns_to_go": lambda m: m.noise(m.n, 6, 1),
    "timesteps": lambda m: torch.arange(6).expand(m.n, -1),
    "inputs": lambda m: m.words(),
    "inputs_embeds": lambda m: m.noise(m.n, m.hints.n_tokens, find(m.config, "hidden_size", "d_model", default=32)),
    "encoder_hidden_states": lambda m: m.noise(
        m.n,
        5,
        find(m.config, "cross_attention_hidden_size", "encoder_hidden_size", "hidden_size", "d_model", default=32),
    ),
    "query_embeds": lambda m: m.noise(m.n, 5, find(m.config, "hidden_size", default=32)),
    "flattened_patches": lambda m: torch.cat(
        [
            torch.arange(1, 17).view(1, 16, 1).expand(m.n, -1, 2).float(),
            m.noise(m.n, 16, find(m.config, "patch_embed_hidden_size", default=768)),
        ],
        -1,
    ),
    "prompt_pixel_values": lambda m: m.noise(*m.given["pixel_values"].shape),
    "prompt_masks": lambda m: m.noise(*m.given["pixel_values"].shape),
    "task_inputs": lambda m: m.words(find(m.config, "task_seq_len", default=12)),
    "input_points": lambda m: m.noise(m.n, 1, 2, 2).abs() * 8,
    "bool_masked_pos": lambda m: _masked(m),
    "image_embeds": lambda m: m.noise(m.n, 16, find(m.config, "hidden_size", default=32)),
    "noise": lambda m: m.noise(m.n, 16).abs(),
    "mel_spectrogram": lambda m: m.noise(m.n, m.bins, 20),
    "latents": lambda m: m.noise(m.n, find(m.config, "hidden_size", default=32), 10),
}


def _masked(m: _Maker) -> torch.Tensor:
    patch = _side(find(m.config, "patch_size", default=8))[0]
    n = (m.image[0] // patch) * (m.image[1] // patch)
    frames = find(m.config, "num_frames")
    if frames:
        n *= frames // find(m.config, "tubelet_size", default=2)
    return (torch.arange(n) % 2 == 0).expand(m.n, -1)


_NONE: frozenset[str] = frozenset()
_WANTED: dict[str, frozenset[str]] = {  # given, if none of those is
    "input_ids": _NONE,
    "pixel_values": _NONE,
    "input_features": _NONE,
    "input_values": frozenset({"input_features"}),
    "pixel_values_videos": frozenset({"pixel_values", "input_ids"}),
    "past_values": _NONE,
    "decoder_input_ids": _NONE,
    "visual_feats": _NONE,
    "visual_pos": _NONE,
    "states": _NONE,
    "actions": _NONE,
    "rewards": _NONE,
    "returns_to_go": _NONE,
    "timesteps": _NONE,
    "flattened_patches": _NONE,
}
_PIXELS = frozenset({"pixel_values"})
_IDS = frozenset({"input_ids"})
_WITH: dict[str, frozenset[str]] = {  # given together with one of those
    "attention_mask": _IDS,
    "bbox": _IDS,
    "mm_token_type_ids": _PIXELS,
    "image_grid_thw": _PIXELS,
    "image_sizes": _PIXELS,
    "pixel_position_ids": _PIXELS,
    "image_position_ids": _PIXELS,
    "spatial_shapes": _PIXELS,
    "pixel_attention_mask": _PIXELS,
    "aspect_ratio_ids": _PIXELS,
    "aspect_ratio_mask": _PIXELS,
    "cross_attention_mask": _PIXELS,
    "image_attention_mask": _PIXELS,
    "input_features_mask": frozenset({"input_features"}),
    "feature_attention_mask": frozenset({"input_features"}),
    "visual_embeds": _IDS,
    "global_attention_mask": _IDS,
    "entity_ids": _IDS,
    "entity_position_ids": _IDS,
    "future_values": frozenset({"past_time_features"}),
    "query_embeds": _NONE,
}


def inputs_of(model: nn.Module, hints: Hints) -> Inputs:
    """Returns the keyword arguments of a forward.

    Raises:
        NotBuilt: If there is no rule for one of them.
    """
    return _Maker(model, hints).make()
