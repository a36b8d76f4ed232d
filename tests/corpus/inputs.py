"""Makes inputs for a model of transformers from the signature of its forward and its config."""

from __future__ import annotations

from torch import nn

from corpus import images, sounds, texts
from corpus.case import Inputs, NotBuilt
from corpus.hints import Hints
from corpus.maker import Make, Maker

MAKERS: dict[str, Make] = {**texts.MAKERS, **sounds.MAKERS, **images.MAKERS}
_FIRST = (
    "input_ids",
    "input_features",
    "audio_mel",
    "input_values",
    "pixel_values",
    "pixel_values_videos",
    "past_values",
    "inputs_embeds",
    "hidden_states",
    "context",
)
_ORDER = [*_FIRST, *(name for name in MAKERS if name not in _FIRST)]
"""What others depend on comes first."""

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
    "grid_thw": _PIXELS,
    "merge_sizes": _PIXELS,
}


def inputs_of(model: nn.Module, hints: Hints) -> Inputs:
    """Returns the keyword arguments of a forward.

    Raises:
        NotBuilt: If there is no rule for one of them.
    """
    maker = Maker(model, hints)
    given = maker.given
    main = getattr(model, "main_input_name", None)
    for name in _ORDER:
        parameter = maker.parameters.get(name)
        if parameter is None or name in hints.without:
            continue
        required = parameter.default is parameter.empty or name == main or name in hints.also
        if required or name in _WANTED or (name in _WITH and _WITH[name] & given.keys()):
            if not required and name in _WANTED and _WANTED[name] & given.keys():
                continue
            try:
                given[name] = MAKERS[name](maker)
            except KeyError:
                if required:
                    raise NotBuilt(f"no rule for its input {name!r} alone") from None
    for name, width in hints.widths:
        if name in given:
            given[name] = maker.noise(*given[name].shape[:-1], width)
    missing = [
        name
        for name, parameter in maker.parameters.items()
        if parameter.default is parameter.empty
        and name not in given
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    if missing:
        raise NotBuilt(f"no rule for its inputs {missing}")
    if not given:
        raise NotBuilt(f"no rule for any of its inputs {list(maker.parameters)}")
    return given
