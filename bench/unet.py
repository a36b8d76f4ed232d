"""A U-Net as diffusion models have it: residual blocks with a time embedding, attention where the image is small."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

MULTIPLES = (1, 2, 4, 4)
"""Channels of each level, in multiples of the first; every level halves the image."""

N_GROUPS = 8
N_CHANNELS = 4


class Residual(nn.Module):
    def __init__(self, n_in: int, n_out: int, n_time: int) -> None:
        super().__init__()
        self.norm_1, self.conv_1 = nn.GroupNorm(N_GROUPS, n_in), nn.Conv2d(n_in, n_out, 3, padding=1)
        self.time = nn.Linear(n_time, n_out)
        self.norm_2, self.conv_2 = nn.GroupNorm(N_GROUPS, n_out), nn.Conv2d(n_out, n_out, 3, padding=1)
        self.skip: nn.Module = nn.Identity() if n_in == n_out else nn.Conv2d(n_in, n_out, 1)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        y = self.conv_1(F.silu(self.norm_1(x))) + self.time(time)[:, :, None, None]
        skipped: torch.Tensor = self.skip(x)
        return skipped.add(self.conv_2(F.silu(self.norm_2(y))))


class Attention(nn.Module):
    def __init__(self, n_channels: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm = nn.GroupNorm(N_GROUPS, n_channels)
        self.qkv, self.out = nn.Linear(n_channels, 3 * n_channels), nn.Linear(n_channels, n_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x.add(self.out(attended).transpose(1, 2).reshape(x.shape))


class Level(nn.Module):
    """Residual blocks, each followed by attention on all levels but the first."""

    def __init__(self, n_ins: list[int], n_out: int, n_time: int, n_heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(n_in, n_out, n_time) for n_in in n_ins)
        self.attentions = nn.ModuleList(Attention(n_out, n_heads) if n_heads else nn.Identity() for _ in n_ins)

    def steps(self) -> list[tuple[nn.Module, nn.Module]]:
        """Returns each block with its attention."""
        return list(zip(self.blocks, self.attentions, strict=True))


def _levels(modules: nn.ModuleList) -> list[Level]:
    return [module for module in modules if isinstance(module, Level)]


class UNet(nn.Module):
    """Returns, for images and a time step, images of the same shape (batch, 4, size, size).

    Args:
        width: Channels of the first level, a multiple of 8.
        n_blocks: Residual blocks per level.
        head_width: Channels per head of the attention.
    """

    def __init__(self, width: int, n_blocks: int, head_width: int) -> None:
        super().__init__()
        self.width = width
        n_time = 4 * width
        widths = [width * multiple for multiple in MULTIPLES]
        heads = [0] + [max(n_out // head_width, 1) for n_out in widths[1:]]
        self.time_1, self.time_2 = nn.Linear(width, n_time), nn.Linear(n_time, n_time)
        self.conv_in = nn.Conv2d(N_CHANNELS, width, 3, padding=1)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        kept = [width]
        for number, n_out in enumerate(widths):
            self.down.append(Level([kept[-1], *[n_out] * (n_blocks - 1)], n_out, n_time, heads[number]))
            kept += [n_out] * n_blocks
            if number < len(widths) - 1:
                self.shrink.append(nn.Conv2d(n_out, n_out, 3, stride=2, padding=1))
                kept.append(n_out)
        self.middle = Level([widths[-1]] * 2, widths[-1], n_time, heads[-1])
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        n_in = widths[-1]
        for number, n_out in reversed(list(enumerate(widths))):
            n_ins = [(n_in if block == 0 else n_out) + kept.pop() for block in range(n_blocks + 1)]
            self.up.append(Level(n_ins, n_out, n_time, heads[number]))
            if number:
                self.grow.append(nn.Conv2d(n_out, n_out, 3, padding=1))
            n_in = n_out
        self.norm_out, self.conv_out = nn.GroupNorm(N_GROUPS, width), nn.Conv2d(width, N_CHANNELS, 3, padding=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        half = self.width // 2
        steps = torch.arange(half, dtype=torch.float32, device=sample.device)
        angles = timestep[:, None].float() * torch.exp(-math.log(10_000) * steps / half)
        embedded = torch.cat([angles.sin(), angles.cos()], dim=1).to(sample.dtype)
        time = F.silu(self.time_2(F.silu(self.time_1(embedded))))
        x = self.conv_in(sample)
        kept = [x]
        for number, level in enumerate(_levels(self.down)):
            for block, attention in level.steps():
                x = attention(block(x, time))
                kept.append(x)
            if number < len(self.shrink):
                x = self.shrink[number](x)
                kept.append(x)
        for block, attention in self.middle.steps():
            x = attention(block(x, time))
        for number, level in enumerate(_levels(self.up)):
            for block, attention in level.steps():
                x = attention(block(torch.cat([x, kept.pop()], dim=1), time))
            if number < len(self.grow):
                x = self.grow[number](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        out: torch.Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out
