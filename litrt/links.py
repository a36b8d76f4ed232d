"""Links in the directory of a store: a store is what is in it, so none may lead out."""

from __future__ import annotations

import os

_CACHES = ("models--", "datasets--", "spaces--")
"""What the folders of repositories begin with in a cache of the Hugging Face hub."""


def link_out(root: str, file: str, known: set[str]) -> str | None:
    """Returns what on the way from a store to a file in it is a link that leads out of the store, or None.

    A cache of the Hugging Face hub consists of links: from `snapshots/<revision>` to files in `blobs` beside it, which
    are not out of a store that lies in the former. The store itself may be a link.

    Args:
        root: The directory of the store.
        file: A path in it.
        known: Paths that have been looked at, which this adds to.
    """
    path = root
    for part in file[len(root) :].strip(os.sep).split(os.sep):
        path = f"{path}{os.sep}{part}"
        if path not in known:
            if os.path.islink(path) and not _is_inside(os.path.realpath(path), os.path.realpath(root)):
                return path
            known.add(path)
    return None


def _is_inside(real: str, home: str) -> bool:
    blobs = _blobs(home)
    return real.startswith(home + os.sep) or (blobs is not None and os.path.dirname(real) == blobs)


def _blobs(home: str) -> str | None:
    """Returns where the files of the repository are that a store was downloaded with, if it lies in such a cache."""
    before, _, _ = f"{home}{os.sep}".rpartition(f"{os.sep}snapshots{os.sep}")
    return os.path.join(before, "blobs") if os.path.basename(before).startswith(_CACHES) else None
