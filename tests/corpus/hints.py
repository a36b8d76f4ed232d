"""What the errors of a model tell about the inputs that it wants."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace

import torch

from corpus.case import Inputs

LAYOUTS = (
    "images",
    "frames of all",
    "frames",
    "tiles",
    "patches",
    "patches of each",
    "squares",
    "squares of each",
    "pairs",
    "packed",
)
"""How the pixels of images may be laid out, to be tried where a model does not take what its arguments tell."""


@dataclass(frozen=True)
class Hints:
    """What the errors of a model have told about the inputs that it wants.

    Attributes:
        n_sequences: Sequences, or images, of a batch.
        n_tokens: Length of a text.
        n_placeholders: Tokens that stand for one image, or one audio, in a text.
        n_sounds: Tokens that stand for one audio, in a text where others may stand for an image.
        books: How ids of several codebooks are laid out: as "rows", or in a dimension more, "first" or "last".
        layout: How the pixels of images are laid out.
        widths: Names of arguments, with the size of their last dimension.
        image: Side of an image.
        channels: Of an image or a spectrogram.
        n_frames: Frames of a spectrogram, or samples of a waveform in units of 100.
        without: Arguments to leave out.
        also: Optional arguments that have to be given.
    """

    n_sequences: int = 2
    n_tokens: int = 12
    n_placeholders: int = 0
    n_sounds: int = 0
    books: str = ""
    layout: str = ""
    widths: tuple[tuple[str, int], ...] = ()
    image: int | None = None
    channels: int | None = None
    n_frames: int | None = None
    without: frozenset[str] = field(default=frozenset())
    also: frozenset[str] = field(default=frozenset())


def second(hints: Hints, texts: bool) -> Hints:
    """Returns the hints for another input: one sequence more, and longer texts."""
    return replace(hints, n_sequences=hints.n_sequences + 1, n_tokens=hints.n_tokens + (4 if texts else 0))


_OPTIONAL = frozenset({"image_sizes", "pixel_attention_mask", "global_attention_mask", "entity_ids", "attention_mask"})

_COUNTS = (
    r"tokens?: ?(?P<tokens>\d+)[^\d]*features?:?.*?(?P<features>\d+)",
    r"(?P<tokens>\d+) tokens.*?(?P<features>\d+) features",
)


def learnt(hints: Hints, message: str, given: Inputs, known: Collection[str]) -> Iterator[Hints]:
    """Yields better hints, from what an error says; `known` are those of its arguments that can be made."""
    for pattern in _COUNTS:
        if (found := re.search(pattern, message)) is not None:
            features = int(found["features"])
            n = hints.n_sequences
            for count in dict.fromkeys(
                (features // n, features, -(-features // n), features // 32, features // 32 // n)
            ):
                if count and re.search("audio|speech|sound", message, re.I):
                    yield replace(hints, n_sounds=count)
                elif count and count != hints.n_placeholders:
                    yield replace(hints, n_placeholders=count)
    if (
        found := re.search(r"expected input\[[\d, ]*\] to have (\d+) channels, but got (\d+) channels", message)
    ) is not None:
        if "pixel_values" in given:
            yield replace(hints, channels=int(found[1]))
        else:
            yield replace(hints, channels=-1)
            yield replace(hints, channels=-2)
    if (found := re.search(r"Input image size \(\d+\*\d+\) doesn't match model \((\d+)\*\d+\)", message)) is not None:
        yield replace(hints, image=int(found[1]))
    if (found := re.search(r"expect.*length (\d+), but found (\d+)", message)) is not None:
        yield replace(hints, n_frames=int(found[1]))
    if re.search(
        r"specify exactly one|cannot specify both|only one of|not both|cannot use both|both .* at the same time",
        message,
    ):
        for name in ("inputs", "pixel_values", "input_ids", "input_features", "input_values"):
            if name in given and len(given) > 1:
                yield replace(hints, without=hints.without | {name})
    if (
        found := re.search(r"argument:? '(\w+)'|specify `?(\w+)`?|`(\w+)` must be|requires? `(\w+)`", message)
    ) is not None:
        name = next(group for group in found.groups() if group)
        if name in known and name not in given:
            yield replace(hints, also=hints.also | {name})
    multiplied = re.search(r"shapes cannot be multiplied \(\d+x(?P<got>\d+) and (?P<wanted>\d+)x\d+\)", message)
    normalized = re.search(r"normalized_shape=\[(?P<wanted>\d+)\].*input of size\[.*?(?P<got>\d+)\]$", message)
    if (found := multiplied or normalized) is not None:
        got, wanted = int(found["got"]), int(found["wanted"])
        for name, value in given.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape[-1] * wanted % got == 0:
                width = value.shape[-1] * wanted // got
                yield replace(hints, widths=(*(pair for pair in hints.widths if pair[0] != name), (name, width)))
    if "shape mismatch" in message and "input_features" in given and not hints.n_sounds:
        yield replace(hints, n_sounds=1)
    if "pixel_values" in given and "input_ids" in given and not hints.n_placeholders and "tokens" not in message:
        yield replace(hints, n_placeholders=16)
    for name in _OPTIONAL & given.keys():
        yield replace(hints, without=hints.without | {name})
    if "NoneType" in message:
        for name in known:
            if name not in given and name not in hints.without and name != "inputs_embeds":
                yield replace(hints, also=hints.also | {name})
    if (
        re.search(r"shape|size|unpack", message)
        and not hints.books
        and {"input_ids", "decoder_input_ids"} & given.keys()
    ):
        for books in ("rows", "first", "last"):
            yield replace(hints, books=books)
    if re.search(r"unpack|[34]D|[Dd]imension|channels|multiplied|normalized|split_with|None", message):
        if "input_features" in given and not hints.channels:
            yield replace(hints, channels=-2)
        if "pixel_values" in given and not hints.layout:
            for layout in LAYOUTS:
                yield replace(hints, layout=layout)
    if {"pixel_values", "input_ids"} <= given.keys() and given.keys() & {"input_features", "input_values"}:
        yield replace(hints, without=hints.without | {"input_features", "input_values"})
