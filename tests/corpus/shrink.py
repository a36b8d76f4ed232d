"""Makes a config small, by rules on the names of its sizes."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

FIRST_WORD = 40
"""Ids from here on are words; those below are left to special tokens."""

N_WORDS = 60
VOCABULARY = FIRST_WORD + N_WORDS


@dataclass(frozen=True)
class Sizes:
    """What the sizes of a small model are.

    Attributes:
        width: Of the hidden states.
        heads: Of an attention.
        layers: Of a stack, at least.
        image: Side of an image, in pixels.
        patch: Side of a patch.
        lists: Whether sizes that are lists, one for each stage, are scaled.
        unknown: Whether other sizes are made small as well.
        sections: Whether rotary embeddings are given sections, for time, height and width.
        parts: Whether the parts that a model may go without are there.
        even: Whether the sizes in all lists are divided by the same number, and so are those that occur in one.
    """

    width: int = 32
    heads: int = 4
    layers: int = 2
    image: int = 32
    patch: int = 8
    lists: bool = True
    unknown: bool = True
    sections: bool = False
    parts: bool = False
    even: bool = False

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclass
class Shrinking:
    """The way from a config to a small one: what was given the same id stays the same."""

    sizes: Sizes
    special: dict[int | str, int]
    listed: frozenset[int] = frozenset()

    def scaled(self, value: int, values: Collection[int]) -> int:
        """Returns a small size for one of a list of them."""
        scale = max(max(self.listed or values) / (2 * self.sizes.width), 1)
        return max(8, round(value / scale / 8) * 8) if value > 8 else value

    def token(self, value: int) -> int:
        """Returns a small id for that of a special token."""
        if 0 <= value < 4:
            return value
        return self.special.setdefault(value, 4 + len(self.special))


# Rules on an int: the first pattern that is found in a name. A rule returns the new value, or None to leave it.

Rule = Callable[[Shrinking, str, int, Mapping[str, Any]], int | None]


def _at_most(limit: Callable[[Sizes], int]) -> Rule:
    return lambda shrinking, name, value, config: min(value, limit(shrinking.sizes))


def _exactly(size: Callable[[Sizes], int]) -> Rule:
    return lambda shrinking, name, value, config: size(shrinking.sizes) if value > 1 else value


def _keep(shrinking: Shrinking, name: str, value: int, config: Mapping[str, Any]) -> None:
    return None


def _token(shrinking: Shrinking, name: str, value: int, config: Mapping[str, Any]) -> int:
    return shrinking.token(value) if value >= 0 else value


def _kv_heads(shrinking: Shrinking, name: str, value: int, config: Mapping[str, Any]) -> int:
    heads = max([v for k, v in config.items() if re.search(_HEADS, k) and isinstance(v, int)], default=value)
    if value >= heads:
        return shrinking.sizes.heads
    return 1 if value == 1 else shrinking.sizes.heads // 2


def _unknown(shrinking: Shrinking, name: str, value: int, config: Mapping[str, Any]) -> int | None:
    if not shrinking.sizes.unknown or value <= shrinking.sizes.width:
        return None
    return shrinking.sizes.width


_HEADS = r"(^|_)(num_heads|n_heads?|attention_heads|attn_heads|num_head|self_attention_heads|nhead|n_heads_\w+)$|heads$"

_RULES: tuple[tuple[str, Rule], ...] = (
    (r"kv_shared_layers", lambda h, n, v, c: 0),
    (r"(num_groups|group_norm)", _at_most(lambda s: 4)),
    (r"(token_?id|token_index|_id|token_idx|_ids)$", _token),
    (
        r"(num_labels|_groups$|stride|kernel|dilation|padding|_factor|ratio|num_channels|in_channels$|out_channels$)",
        _keep,
    ),
    (r"(conv_pos_embedding_groups)", _at_most(lambda s: 2)),
    (r"(num_conv_pos_embeddings)", _at_most(lambda s: 16)),
    (r"vocab", _at_most(lambda s: VOCABULARY)),
    (r"(codebook_size|num_embeddings|hash_buckets)", _at_most(lambda s: 64)),
    (r"(n_codebooks|num_codebooks|num_quantizers|n_q$)", _at_most(lambda s: 4)),
    (r"(kv_heads|key_value_heads|kv_n_heads|num_kv|multi_query_group_num|n_head_kv|num_key_heads)", _kv_heads),
    (r"(num_value_heads)", _exactly(lambda s: s.heads)),
    (r"mamba_n_heads|mamba_num_heads", _exactly(lambda s: 2 * s.heads)),
    (r"mamba_d_head", _exactly(lambda s: s.head_dim)),
    (_HEADS, _exactly(lambda s: s.heads)),
    (r"(d_state|state_size|ssm_state)", _at_most(lambda s: 8)),
    (r"chunk_size", _at_most(lambda s: 8)),
    (r"(head_dim|d_kv|d_head|head_size|kv_channels|_key_dim|rotary_dim)", _exactly(lambda s: s.head_dim)),
    (r"(q_lora_rank|kv_lora_rank|lora_rank|_rank)$", _at_most(lambda s: 16)),
    (r"(top_?k_group|n_group|num_expert_group)", _at_most(lambda s: 1)),
    (r"(first_k_dense|num_dense_layers|num_fully_shared|num_nextn)", _at_most(lambda s: 1)),
    (r"(experts_per_tok|top_?k$|expert.*top_k|num_selected)", _at_most(lambda s: 2)),
    (r"(num_shared_experts|n_shared_experts)", _at_most(lambda s: 1)),
    (r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts|expert_capacity)$", _at_most(lambda s: 4)),
    (r"attn_layer_period|attn_layer_offset", lambda h, n, v, c: 2 if n.endswith("period") else 1),
    (r"(layer_interval|every|_freq|frequency|period|step|_layer$|_offset|interval|_layer_idx)", _keep),
    (
        r"(num_.*layers|n_layers?$|_layers$|^layers$|num_blocks|depth$|n_block|num_res_blocks|_blocks$)",
        _at_most(lambda s: s.layers),
    ),
    (r"(image_size|img_size|input_size|image_resolution|crop_size)", _exactly(lambda s: s.image)),
    (r"temporal_patch", _keep),
    (r"patch_size", lambda h, n, v, c: min(v, h.sizes.patch) if v > 1 else v),
    (r"^window_size$", lambda h, n, v, c: 4 * h.sizes.patch if v > 64 else min(v, 4)),
    (r"^num_windows$", _keep),
    (r"(window)", _at_most(lambda s: 8)),
    (r"(num_filters)", _at_most(lambda s: 4)),
    (r"(prediction_length)", _at_most(lambda s: 8)),
    (r"(num_mel_bins|n_mels|feat_per_channel|num_mel|feature_size)", _at_most(lambda s: 16)),
    (r"(num_frames)", _at_most(lambda s: 4)),
    (
        r"(position_embeddings|n_positions|max_.*positions|seq_len|max_length|context_length|n_ctx|max_seq)",
        _at_most(lambda s: 512),
    ),
    (r"(num_quer|num_latents|num_detection_tokens|query_length|query_tokens|_queries)", _at_most(lambda s: 8)),
    (
        r"(intermediate|ffn|d_ff|n_inner|mlp_dim|dff|feedforward|d_inner|inner_dim|mlp_hidden)",
        _exactly(lambda s: 2 * s.width),
    ),
    (
        r"(hidden_size|d_model|n_embd|embed_dim|hidden_dim|embedding|projection_dim|_width|^width|proj_dim|emb_dim)",
        _exactly(lambda s: s.width),
    ),
    (r"(size|dim|channels|hidden|width|features|d_\w+|filters)", _unknown),
)

_NO_WIDTHS = (
    r"(stride|kernel|ratio|patch|pool|padding|dilation|sampling|grid|image|img|input_size|vocab|codebook|_ids?$)"
)
_WIDTHS = re.compile(r"(hidden|dim|width|channels|size|embed|filters)")
_DEPTHS = re.compile(r"(depth|num_blocks|layers$|num_layers|n_layers|repeats|num_.*blocks)")
_MULTIPLIED: dict[str, Callable[[Any], Any]] = {  # where one number makes all widths small
    "width_coefficient": lambda value: value / 8,
    "depth_coefficient": lambda value: 0.3,
    "hidden_dim": lambda value: value // 8,
}
_LIVELY = {"initializer_range": 0.2, "init_std": 0.2, "layer_scale_init_value": 0.5}


def shrunk(config: Any, sizes: Sizes, shrinking: Shrinking | None = None) -> dict[str, Any]:
    """Returns the arguments that make a small config of the class of `config`, a transformers config."""
    shrinking = shrinking or Shrinking(sizes, {}, _listed(config) if sizes.even else frozenset())
    fields = _fields(config)
    parts = {name: _part(config, name) for name, value in fields.items() if value is None} if sizes.parts else {}
    taken = _taken(config)
    n_taken = len(taken) if len(getattr(config, "stage_names", ())) - 1 in _depths(fields) else 0
    changed = shrunk_fields({**fields, **{k: v for k, v in parts.items() if v is not None}}, sizes, shrinking, n_taken)
    if n_taken:
        n_layers = max(_depths({**fields, **changed}))
        return {**changed, "out_indices": list(range(n_layers - n_taken + 1, n_layers + 1))}
    return {**changed, "out_indices": taken} if taken else changed


def _listed(config: Any) -> frozenset[int]:
    """Returns the sizes that are in a list, of a config and its parts."""
    listed: set[int] = set()
    for name, value in _fields(config).items():
        if is_config(value):
            listed |= _listed(value)
        elif isinstance(value, list | tuple) and _WIDTHS.search(name) and not re.search(_NO_WIDTHS, name):
            listed.update(size for size in value if type(size) is int and size > 8)
    return frozenset(listed)


def _fields(config: Any) -> dict[str, Any]:
    return {
        name: vars(config)[name]
        for name, field in type(config).__dataclass_fields__.items()
        if field.init and name in vars(config) and name not in _NOT_SIZES
    }


def _part(config: Any, name: str) -> Any:
    """Returns the config of a part that a model may go without, and that its config says how to make."""
    spec = getattr(type(config), "sub_configs_defaults", {}).get(name)
    known = spec is not None and hasattr(spec.config_class, "__dataclass_fields__")
    return spec.config_class(**spec.init_kwargs) if known else None


def _taken(config: Any) -> list[int]:
    """Returns the stages of a backbone that are taken from it, where it says so."""
    names, taken = getattr(config, "stage_names", None), getattr(config, "_out_indices", None)
    last = [len(names) - 1] if names else []
    return list(taken) if names and taken and list(taken) != last else []


def _depths(fields: Mapping[str, Any]) -> list[int]:
    return [value for name, value in fields.items() if name in _N_LAYERS and isinstance(value, int)]


def _own(config: Any) -> dict[str, Any]:
    """Returns those of the arguments of a part of a config that are not the default ones of its class."""
    try:
        default = type(config)()
    except Exception:
        return {}
    return {
        name: value
        for name, value in _fields(config).items()
        if isinstance(value, bool | int | float | str | list | tuple) and value != vars(default).get(name, value)
    }


def shrunk_fields(
    fields: Mapping[str, Any], sizes: Sizes, shrinking: Shrinking, least_layers: int = 0
) -> dict[str, Any]:
    """Returns those of the arguments of a model, or its config, that have to be others for it to be small."""
    changed: dict[str, Any] = {}
    kinds = [value for name, value in fields.items() if re.search(r"layer_types$|layers_block_type$", name) and value]
    n_layers = max(
        [sizes.layers, least_layers, *(len(dict.fromkeys(types)) for types in kinds if isinstance(types, list))]
    )
    of_depth = max([v for k, v in fields.items() if k in _N_LAYERS and isinstance(v, int)], default=0)
    for name, value in fields.items():
        new = value
        if "width_coefficient" in fields and (name in _MULTIPLIED or isinstance(value, list | tuple)):
            new = _MULTIPLIED.get(name, lambda v: v)(value)
        elif is_config(value):
            new = {**_own(value), **shrunk(value, sizes, shrinking), "model_type": value.model_type}
        elif isinstance(value, list | tuple) and of_depth and len(value) == of_depth and not name.endswith("_ids"):
            new = _of_each_layer(value, n_layers)
        elif name in _N_LAYERS and isinstance(value, int):
            new = min(value, n_layers)
        elif name in _LIVELY and isinstance(value, float):
            new = _LIVELY[name]
        elif value is None:
            new = _absent(sizes, name) or _absent_token(shrinking, name)
        elif isinstance(value, bool):
            continue
        elif isinstance(value, dict):
            new = _rotary(sizes, value)
        elif isinstance(value, int):
            new = _int(shrinking, name, value, fields)
        elif name.endswith("grid_pinpoints"):
            new = [[2 * sizes.image, sizes.image]]
        elif isinstance(value, list | tuple) and value and all(type(v) is int for v in value):
            new = _ints(shrinking, name, list(value), fields, n_layers)
        elif "dropout" in name and isinstance(value, float):
            continue
        if new is not None and new != value:
            changed[name] = new
    return changed


_NOT_SIZES = frozenset(
    {
        "architectures",
        "id2label",
        "label2id",
        "transformers_version",
        "num_labels",
        "chunk_size_feed_forward",
        "_out_features",
        "_out_indices",
    }
)
_N_LAYERS = frozenset({"num_hidden_layers", "n_layer", "n_layers", "num_layers"})


def is_config(value: object) -> bool:
    """Says whether a field of a config is a config itself."""
    return hasattr(value, "model_type") and hasattr(type(value), "__dataclass_fields__")


def _of_each_layer(values: Any, n_layers: int) -> list[Any]:
    """Returns values of some of the layers, every kind of layer among them."""
    try:
        kinds = list(dict.fromkeys(values))
    except TypeError:
        kinds = []
    if not 0 < len(kinds) <= n_layers:
        kinds = list(values[:n_layers])
    return (kinds * n_layers)[:n_layers] if len(kinds) < n_layers else kinds[:n_layers]


def _absent(sizes: Sizes, name: str) -> int | None:
    """Returns a size that a config leaves open, and that its model does not do without."""
    if name == "head_dim":
        return sizes.head_dim
    if name in ("n_group", "topk_group", "num_experts_per_tok"):
        return 1
    if name == "prediction_length":
        return 8
    if name == "num_key_value_heads":
        return sizes.heads
    return VOCABULARY if name == "vocab_size" else None


def _absent_token(shrinking: Shrinking, name: str) -> int | None:
    """Returns the id of a token that stands for what is no text, of a config that leaves it open."""
    if re.search(r"^(image|audio|video|speech)_token_(id|index)$", name):
        return shrinking.special.setdefault(name, 4 + len(shrinking.special))
    return None


def _rotary(sizes: Sizes, values: dict[str, Any]) -> dict[str, Any]:
    """Returns parameters of rotary embeddings, with sections that divide a small head."""
    if isinstance(values.get("mrope_section"), list) or (sizes.sections and "rope_type" in values):
        half = sizes.head_dim // 2
        return {**values, "mrope_section": [half - half // 4 * 2, half // 4, half // 4], "partial_rotary_factor": 1.0}
    return {key: _rotary(sizes, value) if isinstance(value, dict) else value for key, value in values.items()}


def _int(shrinking: Shrinking, name: str, value: int, config: Mapping[str, Any]) -> int | None:
    if value in shrinking.listed and _WIDTHS.search(name) and not re.search(_NO_WIDTHS, name):
        return shrinking.scaled(value, shrinking.listed)
    for pattern, rule in _RULES:
        if re.search(pattern, name):
            return rule(shrinking, name, value, config)
    return None


def _ints(shrinking: Shrinking, name: str, values: list[int], config: Mapping[str, Any], n_layers: int) -> Any:
    sizes = shrinking.sizes
    if re.search(r"token|_ids?$", name):
        return [shrinking.token(value) for value in values]
    if re.search(r"(image_size|img_size|input_size)", name):
        return [sizes.image] * len(values)
    if re.search(_NO_WIDTHS, name) or not sizes.lists:
        return None
    if re.search(r"window", name):
        return [min(value, 4) for value in values]
    if re.search(r"heads", name):
        return [min(2**number, sizes.heads) for number in range(len(values))]
    if _DEPTHS.search(name):
        return [min(value, 1 if len(values) > 2 else 2) for value in values]
    if re.search(r"(indices|indexes|_layers?$|feature_layer|_idx)", name):
        return sorted({value % n_layers for value in values})
    if _WIDTHS.search(name):
        return [shrinking.scaled(value, values) for value in values]
    return None


def kept(arguments: Mapping[str, Any], default: Any, reasons: list[str]) -> list[dict[str, Any]]:
    """Returns small arguments but for one, which is left as it is by default: first those that the reasons name."""
    names = " ".join(reasons)
    pairs = sorted(_kept(arguments, default), key=lambda pair: pair[0] not in names)
    return [changed for _, changed in pairs]


def _kept(arguments: Mapping[str, Any], default: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, value in arguments.items():
        before = vars(default).get(name)
        if isinstance(value, dict) and is_config(before):
            for inner, others in _kept(value, before):
                yield inner, {**arguments, name: others}
        elif name != "model_type" and before is not None and before != value and not _is_long(name, before):
            yield name, {**arguments, name: before}


def _is_long(name: str, value: object) -> bool:
    """Says whether a size makes inputs so large that a pass takes long."""
    largest = max(value, default=0) if isinstance(value, list | tuple) and all(type(v) is int for v in value) else value
    return bool(re.search(r"image|img|input_size|frames|length|position", name)) and (
        isinstance(largest, int) and largest > 256
    )
