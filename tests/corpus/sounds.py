"""Makes sounds, as waves or as spectra, and series of numbers."""

from __future__ import annotations

import re

import torch

from corpus.maker import Make, Maker, find

_BINS = (
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
_FIRST = "Whisper|Qwen2Audio|Qwen2_5Omni|Voxtral|AudioFlamingo|Kyutai|Qwen3Omni|Glm"


def _bins(m: Maker) -> int:
    audio = find(m.config, "audio_config", default=None)
    found = audio and find(getattr(m.config, "audio_config", m.config), *_BINS, default=16)
    return int(found or find(m.config, *_BINS, default=16))


def _channels_first(m: Maker) -> bool:
    return m.hints.channels == -1 or re.search(_FIRST, type(m.model).__name__) is not None


def _spectra(m: Maker) -> torch.Tensor:
    n_frames = min(m.hints.n_frames or 2 * find(m.config, "max_source_positions", default=32), 3000)
    if m.hints.channels == -2:
        return m.noise(m.n, 1, n_frames, _bins(m))
    return m.noise(m.n, _bins(m), n_frames) if _channels_first(m) else m.noise(m.n, n_frames, _bins(m))


def _waves(m: Maker) -> torch.Tensor:
    n_samples = 100 * (m.hints.n_frames or 24)
    if re.search("^AST|Spectrogram", type(m.model).__name__):
        return m.noise(m.n, find(m.config, "max_length", default=32), _bins(m))
    if m.hints.channels == -2 or hasattr(m.config, "codebook_size") or hasattr(m.config, "audio_channels"):
        return m.noise(m.n, 1, n_samples)
    return m.noise(m.n, n_samples)


def _of_frames(m: Maker) -> torch.Tensor:
    """Returns a mask of frames of spectra, with none of them hidden."""
    shape = next(m.given[name].shape for name in ("input_features", "audio_mel", "hidden_states") if name in m.given)
    return torch.ones(shape[0], shape[2 if _channels_first(m) else 1], dtype=torch.bool)


def _mask(m: Maker) -> torch.Tensor:
    if m.given.keys() & {"input_features", "audio_mel", "hidden_states"}:
        return _of_frames(m)
    raise KeyError


def _past_values(m: Maker) -> torch.Tensor:
    channels = find(m.config, "num_input_channels", default=0)
    length = find(m.config, "context_length", default=32)
    lags = max(find(m.config, "lags_sequence", default=[0]) or [0])
    return m.noise(m.n, length + lags, channels) if channels else m.noise(m.n, length + lags)


def _series_features(m: Maker, which: str) -> torch.Tensor:
    length = m.given["past_values"].shape[1] if which == "past" else find(m.config, "prediction_length", default=8)
    n_features = find(m.config, "num_time_features", default=0)
    return m.noise(m.n, length, n_features) if n_features else torch.zeros(m.n, length, 0)


MAKERS: dict[str, Make] = {
    "input_features": _spectra,
    "audio_mel": _spectra,
    "input_values": _waves,
    "past_values": _past_values,
    "input_features_mask": _of_frames,
    "audio_mel_mask": lambda m: ~_of_frames(m),
    "mask": _mask,
    "feature_attention_mask": lambda m: torch.ones(m.n, m.given["input_features"].shape[-1], dtype=torch.long),
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
    "noise": lambda m: m.noise(m.n, 16).abs(),
    "mel_spectrogram": lambda m: m.noise(m.n, _bins(m), 20),
    "latents": lambda m: m.noise(m.n, find(m.config, "hidden_size", default=32), 10),
}
