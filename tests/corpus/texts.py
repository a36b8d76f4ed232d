"""Makes texts, and what goes with them."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from corpus.maker import Make, Maker, find

_IMAGE_TOKENS = ("image_token_id", "image_token_index", "im_patch_id")
_SOUND_TOKENS = ("audio_token_id", "audio_token_index", "speech_token_id")


def _input_ids(m: Maker) -> torch.Tensor:
    ids = m.words() if m.has("decoder_input_ids") else _of_books(m, m.words())
    if m.hints.n_placeholders:
        others = ("boi_token_id", "media_token_id", "image_patch_id", "video_token_id")
        token = find(m.config, *_IMAGE_TOKENS, *_SOUND_TOKENS, *others, default=4)
        ids = _with_run(m, ids, token, m.hints.n_placeholders)
    if m.hints.n_sounds:
        ids = _with_run(m, ids, find(m.config, *_SOUND_TOKENS, default=4), m.hints.n_sounds)
    eos = getattr(m.config, "eos_token_id", None)
    if eos is not None and "ForSequenceClass" in type(m.model).__name__:
        ids[:, -1] = eos if isinstance(eos, int) else eos[0]
    return ids


def _with_run(m: Maker, ids: torch.Tensor, token: int, n_tokens: int) -> torch.Tensor:
    run = torch.full((m.n, n_tokens), token)
    begin = find(m.config, "vision_start_token_id")
    before = [torch.full((m.n, 1), begin)] if isinstance(begin, int) else []
    return torch.cat([ids[:, :3], *before, run, ids[:, 3:]], 1)


def _of_books(m: Maker, ids: torch.Tensor) -> torch.Tensor:
    """Returns ids of a text, or of each of the codebooks of a sound: more rows of them, or a dimension more."""
    if not m.hints.books:
        return ids
    n_books = next(n for name in _BOOKS if (n := find(m.config, name)))
    n, length = ids.shape
    books = m.words(length, n * n_books)
    if m.hints.books == "rows":
        return books
    return books.view(n, n_books, length) if m.hints.books == "first" else books.view(n, length, n_books)


_BOOKS = ("num_codebooks", "n_codebooks", "num_quantizers", "n_q", "num_code_groups", "num_channels")


def has_books(model: nn.Module) -> bool:
    """Says whether the texts that a model takes may be ids of several codebooks."""
    images = "pixel_values" in inspect.signature(model.forward).parameters
    return find(model.config, *(_BOOKS[:-1] if images else _BOOKS)) is not None


def _attention_mask(m: Maker) -> torch.Tensor:
    if "input_ids" in m.given:
        mask = torch.ones(m.given["input_ids"].shape[:2], dtype=torch.long)
        if m.hints.n_tokens > 4:
            mask[-1, -2:] = 0
        return mask
    features = m.given.get("input_features", m.given.get("input_values"))
    if features is not None:
        return torch.ones(features.shape[0], features.shape[-1], dtype=torch.long)
    states = m.given.get("inputs_embeds", m.given.get("hidden_states", m.given.get("context")))
    if states is None:
        raise KeyError
    return torch.ones(states.shape[:2], dtype=torch.long)


def _bbox(m: Maker) -> torch.Tensor:
    corners = torch.randint(0, 50, (*m.given["input_ids"].shape, 2), generator=m.generator)
    return torch.cat([corners, corners + 9], dim=-1)


def _token_types(m: Maker) -> torch.Tensor:
    types = torch.zeros_like(m.given["input_ids"])
    for kind, names in ((1, _IMAGE_TOKENS[:2]), (3, _SOUND_TOKENS[:2])):
        if (token := find(m.config, *names)) is not None:
            types[m.given["input_ids"] == token] = kind
    return types


def _encoder_states(m: Maker) -> torch.Tensor:
    names = ("cross_attention_hidden_size", "encoder_hidden_size", "hidden_size", "d_model")
    return m.noise(m.n, 5, find(m.config, *names, default=32))


MAKERS: dict[str, Make] = {
    "input_ids": _input_ids,
    "attention_mask": _attention_mask,
    "decoder_input_ids": lambda m: _of_books(m, m.words(7)),
    "bbox": _bbox,
    "mm_token_type_ids": _token_types,
    "qformer_input_ids": lambda m: m.words(),
    "entity_ids": lambda m: torch.randint(1, 16, (m.n, 2), generator=m.generator),
    "entity_position_ids": lambda m: torch.tensor([[[0, 1], [4, 5]]] * m.n),
    "global_attention_mask": lambda m: (
        (torch.arange(m.given["input_ids"].shape[1]) == 0).long().expand(m.n, -1).clone()
    ),
    "inputs": lambda m: m.words(),
    "inputs_embeds": lambda m: m.noise(m.n, m.hints.n_tokens, m.width),
    "encoder_hidden_states": _encoder_states,
    "query_embeds": lambda m: m.noise(m.n, 5, find(m.config, "hidden_size", default=32)),
    "context": lambda m: m.noise(m.n, m.hints.n_tokens, m.width),
    "task_inputs": lambda m: m.words(find(m.config, "task_seq_len", default=12)),
}
