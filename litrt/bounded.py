"""Arrays that zarr-python reads, with codecs that run no code and take no memory beyond a chunk.

zarr-python decodes with whatever codec the metadata names, pickle among them, and its codecs take the memory that a
buffer asks for. Here only codecs are used that are known to do neither: those that leave sizes as they are, and
compressors, whose buffers are decoded here, into no more than the chunk can have.
"""

from __future__ import annotations

import asyncio
import bz2
import gzip
import io
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import zarr
from numcodecs import blosc, lz4, zstd
from numcodecs.abc import Codec as Numcodec
from zarr.abc.codec import BytesBytesCodec
from zarr.codecs import ShardingCodec

from litrt.crc import Bytes

_SAME_SIZE = frozenset(
    {"bytes", "crc32c", "transpose", "crc32", "adler32", "fletcher32", "jenkins_lookup3", "shuffle", "delta"}
)
"""Codecs whose output is no smaller than what it stands for."""

_HARMLESS = _SAME_SIZE | {"fixedscaleoffset", "bitround", "quantize", "astype"}
"""Those, and others whose output has about the size of their input."""

_SLACK_BYTES = 64 << 10
"""What a buffer may hold beside the values of a chunk, such as checksums below it."""


def bounded(array: zarr.Array[Any]) -> zarr.Array[Any]:
    """Returns the array with codecs that take no more memory than a chunk has.

    Raises:
        ValueError: If it has a codec of which that is not known.
    """
    metadata: Any = array.metadata
    if metadata.zarr_format == 3:
        metadata = replace(metadata, codecs=tuple(_codec(codec) for codec in metadata.codecs))
    else:
        n_bytes = math.prod(metadata.chunks) * array.dtype.itemsize
        filters = metadata.filters and tuple(_old_codec(codec, n_bytes) for codec in metadata.filters)
        compressor = metadata.compressor and _old_codec(metadata.compressor, n_bytes)
        metadata = replace(metadata, filters=filters, compressor=compressor)
    return zarr.Array(zarr.AsyncArray(metadata=metadata, store_path=array.store_path))


def is_compressed(array: zarr.Array[Any]) -> bool:
    """Says whether an array may take less room where it is stored than its values do."""
    metadata: Any = array.metadata
    if metadata.zarr_format == 3:
        return not all(name in _SAME_SIZE for name in _names(metadata.codecs))
    old = [*(metadata.filters or ()), *([metadata.compressor] if metadata.compressor else [])]
    return not all(codec.codec_id in _SAME_SIZE for codec in old)


def _names(codecs: Iterable[Any]) -> Iterator[str]:
    for codec in codecs:
        if isinstance(codec, ShardingCodec):
            yield from _names(codec.codecs)
        else:
            yield _name(codec)


def _name(codec: Any) -> str:
    return str(codec.to_dict()["name"]).removeprefix("numcodecs.")


def _codec(codec: Any) -> Any:
    if isinstance(codec, ShardingCodec):
        return ShardingCodec(
            chunk_shape=codec.chunk_shape,
            codecs=[_codec(inner) for inner in codec.codecs],
            index_codecs=codec.index_codecs,  # zarr-python takes only those of a fixed size
            index_location=codec.index_location,
        )
    name = _name(codec)
    return _Bounded(name) if name in _DECODERS else _harmless(codec, name)


def _old_codec(codec: Any, n_bytes: int) -> Any:
    return _OldBounded(codec.codec_id, n_bytes) if codec.codec_id in _DECODERS else _harmless(codec, codec.codec_id)


def _harmless(codec: Any, name: str) -> Any:
    if name not in _HARMLESS:
        raise ValueError(f"litrt does not decode {name!r}, of which it cannot say what it does")
    return codec


@dataclass(frozen=True)
class _Bounded(BytesBytesCodec):
    """Decodes the buffers of a compressor of Zarr v3."""

    name: str
    is_fixed_size = False

    async def _decode_single(self, chunk_data: Any, chunk_spec: Any) -> Any:
        return await asyncio.to_thread(self._decode_sync, chunk_data, chunk_spec)

    def _decode_sync(self, chunk_data: Any, chunk_spec: Any) -> Any:
        n_bytes = math.prod(chunk_spec.shape) * chunk_spec.dtype.to_native_dtype().itemsize
        encoded = memoryview(np.ascontiguousarray(chunk_data.as_numpy_array()).view(np.uint8).data)
        decoded = np.frombuffer(decode(self.name, encoded, n_bytes), dtype=np.uint8)
        return chunk_spec.prototype.buffer.from_array_like(decoded)

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: Any) -> int:
        raise NotImplementedError


class _OldBounded(Numcodec):  # type: ignore[misc]
    """Decodes the buffers of a compressor of Zarr v2."""

    codec_id = "bounded"  # of no registry: it is not written anywhere

    def __init__(self, name: str, n_bytes: int) -> None:
        self._name = name
        self._n_bytes = n_bytes

    def encode(self, buf: Any) -> Any:
        raise NotImplementedError

    def decode(self, buf: Any, out: Any = None) -> Any:
        return decode(self._name, memoryview(buf).cast("B"), self._n_bytes)


def decode(name: str, encoded: memoryview, n_bytes: int) -> bytes | Bytes:
    """Returns what a compressor has made a buffer of, where that is a chunk of `n_bytes` and little more.

    Raises:
        ValueError: If there is more in it, which is found out before memory for that is taken.
        Exception: Whatever the compressor raises for a buffer that is damaged.
    """
    return _DECODERS[name](encoded, n_bytes)


def _check(claimed: int, n_bytes: int) -> int:
    if claimed > n_bytes + _SLACK_BYTES:
        raise ValueError(f"a buffer says that it holds {claimed} bytes, for a chunk of {n_bytes}")
    return claimed


def _zstd(encoded: memoryview, n_bytes: int) -> Bytes:
    claimed = _zstd_bytes(encoded)
    dest = np.empty(n_bytes if claimed is None else _check(claimed, n_bytes), dtype=np.uint8)
    if len(dest):
        zstd.decompress(encoded, dest)
    return dest


def _zstd_bytes(encoded: memoryview) -> int | None:
    """Returns how many bytes a Zstandard frame says that it holds (RFC 8878, 3.1.1.1), or None where it does not."""
    if len(encoded) < 6 or bytes(encoded[:4]) != b"\x28\xb5\x2f\xfd":
        raise ValueError("it is no Zstandard frame")
    descriptor = encoded[4]
    is_single, n_dictionary = descriptor >> 5 & 1, (0, 1, 2, 4)[descriptor & 3]
    n_size = (is_single, 2, 4, 8)[descriptor >> 6]
    at = 5 + (not is_single) + n_dictionary
    size = int.from_bytes(encoded[at : at + n_size], "little")
    return size + 256 * (n_size == 2) if n_size else None


def _blosc(encoded: memoryview, n_bytes: int) -> bytes:
    if len(encoded) < 16 or int.from_bytes(encoded[12:16], "little") != len(encoded):
        raise ValueError("it is no whole Blosc buffer")
    _check(int.from_bytes(encoded[4:8], "little"), n_bytes)
    _check(int.from_bytes(encoded[8:12], "little"), n_bytes)  # of a block, of which it takes several
    found: bytes = blosc.decompress(encoded)
    return found


def _lz4(encoded: memoryview, n_bytes: int) -> bytes:
    _check(int.from_bytes(encoded[:4], "little"), n_bytes)
    found: bytes = lz4.decompress(encoded)
    return found


def _gzip(encoded: memoryview, n_bytes: int) -> bytes:
    return _whole(gzip.GzipFile(fileobj=io.BytesIO(encoded)).read(n_bytes + _SLACK_BYTES + 1), n_bytes)


def _zlib(encoded: memoryview, n_bytes: int) -> bytes:
    return _whole(zlib.decompressobj().decompress(encoded, n_bytes + _SLACK_BYTES + 1), n_bytes)


def _bz2(encoded: memoryview, n_bytes: int) -> bytes:
    return _whole(bz2.BZ2Decompressor().decompress(encoded, n_bytes + _SLACK_BYTES + 1), n_bytes)


def _whole(decoded: bytes, n_bytes: int) -> bytes:
    _check(len(decoded), n_bytes)
    return decoded


_DECODERS: dict[str, Callable[[memoryview, int], bytes | Bytes]] = {
    "blosc": _blosc,
    "bz2": _bz2,
    "gzip": _gzip,
    "lz4": _lz4,
    "zlib": _zlib,
    "zstd": _zstd,
}
"""What decodes the buffers of a compressor."""
