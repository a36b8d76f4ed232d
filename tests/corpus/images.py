"""Makes images and videos, whole or in patches, and what goes with them."""

from __future__ import annotations

import re
from typing import Any

import torch

from corpus.maker import Make, Maker, find, side


def _vision(m: Maker) -> Any:
    return find(m.config, "vision_config", "backbone_config") or m.config


def _image(m: Maker) -> tuple[int, int]:
    if m.hints.image:
        return m.hints.image, m.hints.image
    return side(find(m.config, "image_size", "img_size", default=32))


def _channels(m: Maker) -> int:
    return int(m.hints.channels or find(m.config, "num_channels", "in_channels", "in_chans", default=3))


def _pixel_values(m: Maker) -> torch.Tensor:
    image = _channels(m), *_image(m)
    patch = side(find(_vision(m), "patch_size", "spatial_patch_size", default=8))[0]
    square = _channels(m), patch, patch
    width = _channels(m) * patch * patch * find(_vision(m), "temporal_patch_size", default=1)
    n_frames = find(m.config, "num_frames", "frames_per_clip", default=4)
    shapes = {
        "images": (m.n, *image),
        "frames": (m.n, n_frames, *image),
        "frames of all": (m.n * n_frames, *image),
        "tiles": (m.n, 1, *image),
        "patches": (m.n * 16, width),
        "patches of each": (m.n, 16, width),
        "squares": (m.n * 16, *square),
        "squares of each": (m.n, 16, *square),
        "pairs": (m.n, 2, *image),
        "packed": (1, _channels(m), patch, m.n * 16 * patch),
        "next": (m.n, 3, *image),
        "aspects": (m.n, 1, find(m.config, "max_num_tiles", default=4), *image),
    }
    return m.noise(*shapes[m.hints.layout or _layout(m)])


def _layout(m: Maker) -> str:
    kind = type(m.model).__name__
    if m.has("spatial_shapes", "pixel_position_ids", "image_position_ids"):
        return "patches of each"
    if m.has("image_grid_thw", "grid_thw"):
        return "patches"
    if m.has("aspect_ratio_ids"):
        return "aspects"
    if m.has("image_sizes") and find(m.config, "image_grid_pinpoints") is not None:
        return "next"
    if m.has("pixel_attention_mask", "image_attention_mask"):
        return "tiles"
    if re.search("Video|VJEPA|Vivit|Timesformer|XCLIP|TimeSformer", kind) and find(
        m.config, "num_frames", "frames_per_clip"
    ):
        return "frames"
    return "images"


def _positions(m: Maker) -> torch.Tensor:
    grid = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy")
    return torch.stack(grid, -1).view(1, 16, 2).expand(m.n, -1, -1)


def _grid(m: Maker) -> torch.Tensor:
    return torch.tensor([[1, 4, 4]] * m.n)


def _hidden_states(m: Maker) -> torch.Tensor:
    if m.has("grid_thw"):
        patch = side(find(_vision(m), "patch_size", "spatial_patch_size", default=8))[0]
        return m.noise(m.n * 16, _channels(m) * find(_vision(m), "temporal_patch_size", default=1) * patch * patch)
    return m.noise(m.n, m.hints.n_tokens, m.width)


def _ones_like_images(m: Maker) -> torch.Tensor:
    shape = m.given["pixel_values"].shape
    return torch.ones(
        *(shape[:-3] if len(shape) > 3 else shape[:2]), *(shape[-2:] if len(shape) > 3 else ()), dtype=torch.long
    )


def _masked(m: Maker) -> torch.Tensor:
    patch = side(find(m.config, "patch_size", default=8))[0]
    n = (_image(m)[0] // patch) * (_image(m)[1] // patch)
    frames = find(m.config, "num_frames")
    if frames:
        n *= frames // find(m.config, "tubelet_size", default=2)
    return (torch.arange(n) % 2 == 0).expand(m.n, -1)


def _patched_text(m: Maker) -> torch.Tensor:
    places = torch.arange(1, 17).view(1, 16, 1).expand(m.n, -1, 2).float()
    return torch.cat([places, m.noise(m.n, 16, find(m.config, "patch_embed_hidden_size", default=768))], -1)


def _like_pixels(m: Maker) -> torch.Tensor:
    return m.noise(*m.given["pixel_values"].shape)


def _sizes(m: Maker) -> torch.Tensor:
    return torch.tensor([list(_image(m))] * m.n)


MAKERS: dict[str, Make] = {
    "pixel_values": _pixel_values,
    "pixel_values_videos": lambda m: m.noise(m.n, find(m.config, "num_frames", default=4), _channels(m), *_image(m)),
    "hidden_states": _hidden_states,
    "image_grid_thw": _grid,
    "grid_thw": _grid,
    "merge_sizes": lambda m: torch.tensor([find(m.config, "spatial_merge_size", default=1)] * m.n),
    "image_sizes": _sizes,
    "target_sizes": lambda m: torch.tensor([[4, 4]] * m.n) if m.hints.layout == "packed" else _sizes(m),
    "pixel_attention_mask": _ones_like_images,
    "pixel_position_ids": _positions,
    "image_position_ids": _positions,
    "spatial_shapes": lambda m: torch.tensor([[4, 4]] * m.n),
    "aspect_ratio_ids": lambda m: torch.ones(m.n, 1, dtype=torch.long),
    "aspect_ratio_mask": lambda m: torch.ones(m.n, 1, find(m.config, "max_num_tiles", default=4), dtype=torch.long),
    "cross_attention_mask": lambda m: torch.ones(
        m.n, m.given["input_ids"].shape[1], 1, find(m.config, "max_num_tiles", default=4), dtype=torch.long
    ),
    "image_attention_mask": lambda m: torch.ones(m.n, m.given["input_ids"].shape[1], 1, dtype=torch.long),
    "visual_feats": lambda m: m.noise(m.n, 5, find(m.config, "visual_feat_dim", default=32)),
    "visual_pos": lambda m: m.noise(m.n, 5, 4).abs(),
    "visual_embeds": lambda m: m.noise(m.n, 5, find(m.config, "visual_embedding_dim", default=32)),
    "flattened_patches": _patched_text,
    "high_res_pixel_values": _like_pixels,
    "prompt_pixel_values": _like_pixels,
    "prompt_masks": _like_pixels,
    "input_points": lambda m: m.noise(m.n, 1, 2, 2).abs() * 8,
    "bool_masked_pos": _masked,
    "image_embeds": lambda m: m.noise(m.n, 16, find(m.config, "hidden_size", default=32)),
}
