"""Vision nets in plain torch.nn, built as those of the timm package are, with sizes drawn at random."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from corpus.case import Case, Inputs


class _Residual(nn.Module):
    """A bottleneck with batch statistics, and squeeze and excitation where it has a ratio."""

    def __init__(self, width: int, out: int, stride: int, squeeze: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, stride, 1, groups=4, bias=False), nn.BatchNorm2d(out)
        self.reduce = nn.Conv2d(out, squeeze, 1) if squeeze else None
        self.expand = nn.Conv2d(squeeze, out, 1) if squeeze else None
        self.short = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True))), inplace=True)
        if self.reduce is not None and self.expand is not None:
            y = y * self.expand(F.silu(self.reduce(y.mean((2, 3), keepdim=True)))).sigmoid()
        return F.relu(y + self.short(x))


class ResNet(nn.Module):
    """Stages of bottlenecks; an EfficientNet where they squeeze and excite."""

    def __init__(self, widths: list[int], squeeze: int = 0) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 7, 2, 3, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        pairs = pairwise(widths)
        self.stages = nn.Sequential(*(_Residual(a, b, 1 + number % 2, squeeze) for number, (a, b) in enumerate(pairs)))
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.adaptive_avg_pool2d(self.stages(self.stem(x)), 1).flatten(1))


class _ConvNextBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(0.5 * torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(F.gelu(self.up(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))))
        return x + (self.gamma * y).permute(0, 3, 1, 2)


class ConvNext(nn.Module):
    """Depthwise convolutions with a layer scale; what lies between the stages normalizes and halves."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 4)]
        for number, width in enumerate(widths):
            if number:
                parts += [nn.GroupNorm(1, widths[number - 1]), nn.Conv2d(widths[number - 1], width, 2, 2)]
            parts += [_ConvNextBlock(width), _ConvNextBlock(width)]
        self.features = nn.Sequential(*parts)
        self.head = nn.Sequential(nn.LayerNorm(widths[-1]), nn.Linear(widths[-1], 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Mixer(nn.Module):
    """Layers over tokens and over channels, in turns."""

    def __init__(self, width: int, depth: int, n_tokens: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * depth))
        self.tokens = nn.ModuleList(
            nn.Sequential(nn.Linear(n_tokens, 32), nn.GELU(), nn.Linear(32, n_tokens)) for _ in range(depth)
        )
        self.channels = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width)) for _ in range(depth)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for number, (tokens, channels) in enumerate(zip(self.tokens, self.channels, strict=True)):
            x = x + tokens(self.norms[2 * number](x).transpose(1, 2)).transpose(1, 2)
            x = x + channels(self.norms[2 * number + 1](x))
        return self.head(x.mean(1))


class _WindowAttention(nn.Module):
    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        at = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        apart = (at[:, :, None] - at[:, None, :]) + window - 1
        self.register_buffer("index", apart[0] * (2 * window - 1) + apart[1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, height, width, channels = x.shape
        size = self.window
        y = torch.roll(self.norm(x), (-self.shift, -self.shift), (1, 2))
        y = y.view(n, height // size, size, width // size, size, channels).permute(0, 1, 3, 2, 4, 5)
        y = y.reshape(-1, size * size, channels)
        q, k, v = self.qkv(y).view(*y.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(size * size, size * size, -1).permute(2, 0, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        y = self.out(y.transpose(1, 2).reshape(-1, size * size, channels))
        y = y.view(n, height // size, width // size, size, size, channels).permute(0, 1, 3, 2, 4, 5)
        return x + torch.roll(y.reshape(n, height, width, channels), (self.shift, self.shift), (1, 2))


class Swin(nn.Module):
    """Attention in windows, every other one shifted, with a table of relative positions."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.ModuleList(_WindowAttention(width, 4, 4, 2 * (number % 2)) for number in range(depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).permute(0, 2, 3, 1)
        for block, mlp in zip(self.blocks, self.mlps, strict=True):
            x = block(x)
            x = x + mlp(x)
        return self.head(x.mean((1, 2)))


class UNet(nn.Module):
    """Down and up again, with what was on the way down beside it."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.down = nn.ModuleList(self._block(a, b) for a, b in pairwise([3, *widths]))
        pairs = list(pairwise(widths[::-1]))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in pairs)
        self.merge = nn.ModuleList(self._block(2 * b, b) for _, b in pairs)
        self.last = nn.Conv2d(widths[0], 2, 1)

    @staticmethod
    def _block(width: int, out: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(width, out, 3, padding=1), nn.InstanceNorm2d(out, affine=True), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for number, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if number else x)
            kept.append(x)
        for up, merge, beside in zip(self.up, self.merge, kept[-2::-1], strict=True):
            x = merge(torch.cat([up(x), beside], 1))
        return self.last(x)


def _widths(rng: random.Random, n: int) -> list[int]:
    return sorted(8 * rng.randint(1, 6) for _ in range(n))


_NETS: dict[str, Callable[[random.Random], Callable[[], nn.Module]]] = {
    "resnet": lambda rng: functools.partial(ResNet, _widths(rng, 5)),
    "efficientnet": lambda rng: functools.partial(ResNet, _widths(rng, 5), rng.randint(2, 6)),
    "convnext": lambda rng: functools.partial(ConvNext, _widths(rng, 3)),
    "mixer": lambda rng: functools.partial(Mixer, 8 * rng.randint(2, 6), rng.randint(2, 4)),
    "swin": lambda rng: functools.partial(Swin, 16 * rng.randint(1, 3), rng.randint(2, 4)),
    "unet": lambda rng: functools.partial(UNet, _widths(rng, 4)),
}


def _inputs(number: int) -> Inputs:
    return {"x": torch.randn(2 + number, 3, 32, 32, generator=torch.Generator().manual_seed(number))}


def names() -> list[str]:
    """Returns the names of the nets, each with a few draws of sizes."""
    return [f"{name} {draw}" for name in _NETS for draw in range(3)]


def case_of(name: str) -> Case:
    """Returns a net as a case."""
    kind, draw = name.split()
    return Case(name, "plain vision nets", _NETS[kind](random.Random(int(draw))), _inputs)
