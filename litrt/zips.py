"""What zip files say of their members, held against what they can have."""

from __future__ import annotations

import os
import zipfile

_MOST_RATIO = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 1032}
"""Bytes that become of one at most."""


def is_zip(path: str | os.PathLike[str]) -> bool:
    """Says whether a file is a zip file that can be opened."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # it ends as one, and is none
        return False


def member_sizes(path: str | os.PathLike[str]) -> dict[str, int]:
    """Returns the bytes of every member of a zip file when it is read, by name.

    Raises:
        ValueError: If these are more than can come of the bytes of the file, each of which belongs to one member.
        zipfile.BadZipFile: If it is no zip file.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    size, n_bytes = os.path.getsize(path), sum(member.compress_size for member in members)
    if n_bytes > size:
        raise ValueError(f"its members have {n_bytes} bytes, and the file {size}")
    for member in members:
        if member.file_size > _MOST_RATIO.get(member.compress_type, 0) * member.compress_size:
            raise ValueError(
                f"{member.filename!r} has {member.file_size} bytes, and {member.compress_size} of compression "
                f"{member.compress_type} in the file"
            )
    return {member.filename: member.file_size for member in members}
