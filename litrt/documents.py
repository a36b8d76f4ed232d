"""JSON that somebody else has written: parsed only where what Python makes of it stays small."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from litrt.errors import StoreError

MOST_BYTES = 100_000_000
"""What a document may take: as much as the header of a safetensors file."""

_JSON_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # which does not wait for who writes a pipe

MOST_VALUES = 1 << 21
"""Values that a document may have, of which Python takes up to 100 bytes for each. The header of a safetensors file has
nine of them for a tensor, and the group of a store one or two: these are enough for 200 thousand tensors."""


def parse(content: bytes) -> Any:
    """Returns what a document says.

    Raises:
        ValueError: If it is not JSON, or has too many values.
        RecursionError: If it is nested too deep.
    """
    check_values(content)
    return json.loads(content)


def check_values(content: bytes) -> None:
    """Raises a ValueError where a document has too many values: by its commas and brackets, without parsing it."""
    if len(content) <= MOST_VALUES:
        return
    n_values = sum(content.count(mark) for mark in (b",", b"[", b"{"))
    if n_values > MOST_VALUES:
        raise ValueError(f"it has more than {MOST_VALUES} values")


def read(
    file: Path,
    check_link: Callable[[str], None] = lambda file: None,
    *,
    what: str = "the metadata of a store",
    remedy: str = "Run litrt convert again.",
) -> dict[str, Any] | None:
    """Returns the object that a file of metadata has, or None where there is no file, or no object in it.

    Args:
        file: Its path.
        check_link: Called with it where it is a link.
        what: What it should be, for errors.
        remedy: What to do where it is not.

    Raises:
        StoreError: If it is no JSON, or larger than metadata is; or what `check_link` raises for a link.
    """
    try:
        fd = os.open(file, _JSON_FLAGS | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        check_link(str(file))
        try:
            fd = os.open(file, _JSON_FLAGS)
        except OSError:
            return None
    with open(fd, "rb") as opened:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
            kind = f"it has {status.st_size} bytes" if stat.S_ISREG(status.st_mode) else "it is no file at all"
            raise StoreError(f"{file} is not {what}: {kind}. {remedy}")
        content = opened.read()
    try:
        document = parse(content)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{file} cannot be read as JSON: {error}. {remedy}") from error
    return document if isinstance(document, dict) else None
