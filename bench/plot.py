"""Draws seconds per pass against budget: litrt by policy, the bound, and the others as lines.

    python -m bench plot sweep.jsonl --out sweep.png

Points are medians, whiskers go from the fastest pass to the slowest. Nothing can be in what is shaded.
"""

from __future__ import annotations

import argparse
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers import PEERS
from bench.samples import Samples, Spread, read
from bench.simulate import BOUND, PLANNED, Simulated
from litrt.units import format_bytes

INK = "#222222"
QUIET = "#6b6b6b"
SHADE = "#ececec"
OURS = "#0b62a8"
COLORS = ("#c8553d", "#7a5195", "#2a8f5b", "#b8860b", "#4d7c8a")
_CURVES = {"belady": "litrt", "lru": "litrt with LRU eviction"}
_LABEL_HEIGHT = 0.055
"""Of a line of text, as a share of the height of a panel."""

_PANEL_INCHES = 4.6
_NEAR_END = 96
"""Per cent of the weights from which on a curve ends at the right, where its name goes."""


@dataclass(frozen=True)
class Curve:
    """Seconds at some budgets.

    Attributes:
        name: Its label.
        color: Its color.
        marker: Of its points.
        points: Shares of the weights, and seconds.
        is_ours: Drawn above the others, and heavier.
    """

    name: str
    color: str
    marker: str
    points: tuple[tuple[float, Spread], ...]
    is_ours: bool = False


@dataclass(frozen=True)
class Picture:
    """One panel.

    Attributes:
        title: Above it.
        unit: What the seconds are of.
        curves: What depends on the budget.
        bound: Shares, and the seconds that no schedule can beat.
        levels: Names and seconds of what does not depend on the budget.
    """

    title: str
    unit: str
    curves: tuple[Curve, ...]
    bound: tuple[tuple[float, float], ...]
    levels: tuple[tuple[str, float], ...] = ()


def of_samples(samples: Samples) -> Picture:
    """Returns the picture of a sweep."""
    total = samples.model_bytes
    curves = []
    for number, policy in enumerate(samples.policies):
        points = []
        for budget in samples.budgets:
            spread = samples.spread(samples.of("litrt", budget, policy))
            if spread is not None:
                points.append((min(samples.budget_bytes(budget) / total, 1.0), spread))
        color = OURS if policy == "belady" else COLORS[number % len(COLORS)]
        marker = "o" if policy == "belady" else "s"
        curves.append(Curve(_CURVES.get(policy, policy), color, marker, tuple(points), policy == "belady"))
    bound = []
    for budget in samples.budgets:
        seconds = samples.bound_s(samples.budget_bytes(budget))
        if seconds is not None and math.isfinite(seconds):
            bound.append((min(samples.budget_bytes(budget) / total, 1.0), seconds))
    levels = []
    for system in samples.systems:
        spread = samples.spread(samples.of(system))
        if spread is not None:
            levels.append((PEERS[system].label, spread.median_s))
    return Picture(title(samples), unit(samples), tuple(curves), tuple(bound), tuple(levels))


def unit(samples: Samples) -> str:
    """Returns what the seconds of a sweep are of."""
    return "token" if samples.header["arguments"]["mode"] in ("generate", "decode") else "pass"


def title(samples: Samples) -> str:
    """Returns what a sweep is of."""
    model, arguments = samples.header["model"], samples.header["arguments"]
    parts = [f"{model['name']}, {format_bytes(model['bytes'])} of {model['dtype']}"]
    if arguments["mode"] == "pass":
        parts.append(f"{arguments['tokens']} tokens per pass" if model["kind"] not in ("vit", "unet") else "one image")
    elif arguments["mode"] == "decode":
        parts.append(f"one token after {arguments['tokens']}")
    else:
        parts.append(f"{arguments['new_tokens']} tokens after {arguments['tokens']}")
    if samples.disk_bps:
        parts.append(f"disk of {samples.disk_bps / 1e9:.1f} GB/s")
    if samples.header.get("limit_bytes"):
        parts.append(f"others in {format_bytes(samples.header['limit_bytes'])}")
    return "; ".join(parts)


def of_simulated(panel: Simulated) -> Picture:
    """Returns the picture of a simulation."""
    curves = []
    others = [name for name in panel.seconds if name not in (BOUND, PLANNED)]
    for name, seconds in panel.seconds.items():
        if name == BOUND:
            continue
        points = tuple(
            (share, Spread(s, s, s)) for share, s in zip(panel.budgets, seconds, strict=True) if math.isfinite(s)
        )
        color = OURS if name == PLANNED else COLORS[others.index(name) % len(COLORS)]
        curves.append(Curve(name, color, "o" if name == PLANNED else "", points, name == PLANNED))
    bound = [(share, s) for share, s in zip(panel.budgets, panel.seconds[BOUND], strict=True) if math.isfinite(s)]
    return Picture(panel.title, "pass", tuple(curves), tuple(bound))


def draw(pictures: Sequence[Picture], path: Path) -> None:
    """Draws panels under each other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(pictures), 1, figsize=(9.6, _PANEL_INCHES * len(pictures)), squeeze=False)
    for picture, axes in zip(pictures, panels[:, 0], strict=True):
        _draw_panel(axes, picture)
    height = _PANEL_INCHES * len(pictures)
    figure.subplots_adjust(left=0.075, right=0.71, top=1 - 0.4 / height, bottom=0.55 / height, hspace=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_panel(axes: Any, picture: Picture) -> None:
    medians = [spread.median_s for curve in picture.curves for _, spread in curve.points]
    every = [*medians, *(s for _, s in picture.bound), *(s for _, s in picture.levels)]
    if not every:
        raise ValueError(f"nothing to draw: {picture.title}")
    low, high = min(every) / 1.6, max(every) * 1.25
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.set_xlim(0, 101)
    if picture.bound:
        x, y = ([*column] for column in zip(*((100 * share, s) for share, s in picture.bound), strict=True))
        if len(x) == 1:
            x, y = [x[0] - 1.5, x[0] + 1.5], y * 2
        axes.fill_between(x, y, low, color=SHADE, linewidth=0, zorder=0)
        axes.plot(x, y, color="#a8a8a8", linewidth=1, zorder=1)
        axes.annotate(
            "no schedule is faster", (x[0], low), xytext=(6, 7), textcoords="offset points", color=QUIET, fontsize=9
        )
    labels = []
    for name, seconds in picture.levels:
        axes.axhline(seconds, color=QUIET, linewidth=1, linestyle=(0, (5, 3)), zorder=1)
        labels.append((seconds, seconds, f"{name}, {_seconds(seconds)}", QUIET, False))
    for curve in picture.curves:
        if not curve.points:
            continue
        x = [100 * share for share, _ in curve.points]
        y = [spread.median_s for _, spread in curve.points]
        whiskers = [[s.median_s - s.min_s for _, s in curve.points], [s.max_s - s.median_s for _, s in curve.points]]
        varies = any(any(some) for some in whiskers)
        axes.errorbar(
            x,
            y,
            yerr=whiskers if varies else None,
            color=curve.color,
            marker=curve.marker or None,
            markersize=5,
            capsize=2.5,
            linewidth=2.2 if curve.is_ours else 1.4,
            elinewidth=1,
            zorder=4 if curve.is_ours else 3,
        )
        if x[-1] > _NEAR_END:
            labels.append((y[-1], max(y[-2:]), curve.name, curve.color, curve.is_ours))
        else:
            axes.annotate(
                curve.name,
                (x[-1], y[-1]),
                xytext=(9, 0),
                textcoords="offset points",
                color=curve.color,
                fontsize=9,
                va="center",
                fontweight="bold" if curve.is_ours else "normal",
            )
    _label(axes, labels, low, high)
    axes.set_title("\n".join(textwrap.wrap(picture.title, 118)), fontsize=9.5, color=INK, loc="left")
    axes.set_xlabel("budget, % of the weights", color=INK)
    axes.set_ylabel(f"seconds per {picture.unit}", color=INK)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if _is_round(value) else "")
    axes.tick_params(which="both", colors=INK, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)


Label = tuple[float, float, str, str, bool]
"""Where a line ends, where it comes from, its name and its color, and whether it is litrt's."""


def _label(axes: Any, labels: list[Label], low: float, high: float) -> None:
    """Writes names at the right, each beside the end of its line, moved apart where they would overlap."""
    span = math.log(high / low)
    labels = sorted(labels, key=lambda label: (float(f"{label[0]:.2g}"), label[1]))
    want = [math.log(label[0] / low) / span for label in labels]
    for (_, _, text, color, is_ours), at, is_at in zip(labels, want, spread_out(want, _LABEL_HEIGHT), strict=True):
        axes.annotate(
            "",
            (1.035, is_at),
            (1.003, at),
            xycoords="axes fraction",
            textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.7},
        )
        axes.text(
            1.042,
            is_at,
            text,
            transform=axes.transAxes,
            color=color,
            fontsize=9,
            va="center",
            fontweight="bold" if is_ours else "normal",
        )


def spread_out(wanted: Sequence[float], gap: float) -> list[float]:
    """Returns places at least `gap` apart, in the same order, close to those that are wanted, which ascend.

    Neighbours that would overlap become one cluster, centred where its members want to be on average.
    """
    clusters: list[tuple[int, float]] = []  # how many, and the place of the middle
    for at in wanted:
        count, middle = 1, at
        while clusters and middle - clusters[-1][1] < (count + clusters[-1][0]) / 2 * gap:
            other, its_middle = clusters.pop()
            middle = (middle * count + its_middle * other) / (count + other)
            count += other
        clusters.append((count, middle))
    return [middle + (number - (count - 1) / 2) * gap for count, middle in clusters for number in range(count)]


def _seconds(value: float) -> str:
    digits = max(0, 1 - math.floor(math.log10(value))) if value else 0
    return f"{value:.{min(digits, 6)}f} s"


def _is_round(value: float) -> bool:
    return round(value / 10 ** math.floor(math.log10(value)), 6) in (2.0, 5.0)


def main(argv: list[str]) -> int:
    """Draws the picture of one sweep, or of several under each other."""
    parser = argparse.ArgumentParser(
        prog="python -m bench plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", help="raw samples of `bench sweep`")
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    arguments = parser.parse_args(argv)
    draw([of_samples(read(path)) for path in arguments.files], arguments.out)
    return 0
