"""What zip files say of their members, held against what they can have."""

from __future__ import annotations

import os
import zipfile
from typing import Any

MOST_DIRECTORY_BYTES = 32 << 20
"""What the directory at the end of a zip file may take. A member has some hundred bytes of it and 46 at least, and
Python takes most of a kilobyte for each: these are enough for a quarter of a million."""

MOST_DEFLATED = 1032
"""Bytes that zlib makes of one at most."""

_MOST_RATIO = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: MOST_DEFLATED}
"""Bytes that become of one at most."""

_DIRECTORY_BYTES = 5
"""Where the record of zipfile that describes the end of a file has the bytes of the directory."""


def is_zip(path: str | os.PathLike[str]) -> bool:
    """Says whether a file is a zip file that can be opened; neither a pipe nor a device is."""
    try:
        return os.path.isfile(path) and zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # it ends as one, and is none
        return False


def open_zip(path: str | os.PathLike[str]) -> zipfile.ZipFile:
    """Opens a zip file that has not too many members: zipfile takes memory for each of them as it opens it.

    Raises:
        ValueError: If it has more.
        zipfile.BadZipFile: If it is no zip file.
    """
    with open(path, "rb") as file:
        end: Any = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    # However many members the end says that there are, zipfile reads as many as the directory has.
    if end is not None and end[_DIRECTORY_BYTES] > MOST_DIRECTORY_BYTES:
        raise ValueError(
            f"the directory of its members has {end[_DIRECTORY_BYTES]} bytes, and may have {MOST_DIRECTORY_BYTES}"
        )
    return zipfile.ZipFile(path)


def member_sizes(path: str | os.PathLike[str]) -> dict[str, int]:
    """Returns the bytes of every member of a zip file when it is read, by name.

    Raises:
        ValueError: If these are more than can come of the bytes of the file, each of which belongs to one member; or
            if there are too many members.
        zipfile.BadZipFile: If it is no zip file.
    """
    with open_zip(path) as archive:
        check_members(archive)
        return {member.filename: member.file_size for member in archive.infolist()}


def check_members(archive: zipfile.ZipFile) -> None:
    """Raises a ValueError where members have more bytes than can come of those of the file."""
    size, members = os.path.getsize(str(archive.filename)), archive.infolist()
    n_bytes = sum(member.compress_size for member in members)
    if n_bytes > size:
        raise ValueError(f"its members have {n_bytes} bytes, and the file {size}")
    for member in members:
        if member.file_size > _MOST_RATIO.get(member.compress_type, 0) * member.compress_size:
            raise ValueError(
                f"{member.filename!r} has {member.file_size} bytes, and {member.compress_size} of compression "
                f"{member.compress_type} in the file"
            )
