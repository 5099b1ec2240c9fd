"""Entropy coding of bytes by a Huffman code: that of the standard library's deflate, or of zstandard."""

from __future__ import annotations

import zlib

import numpy as np

from sparsehooks import ArtifactError, Codec, Layout

_STORED, _DEFLATE, _ZSTANDARD = range(3)
_WINDOW = 1 << 23
"""The most memory that a frame of zstandard may ask for; what is written here needs less."""


def squeeze(data: np.ndarray) -> bytes:
    """The smallest of: the bytes as they are, raw deflate, and zstandard where it is installed.

    Args:
        data: uint8, one dimension.

    Returns:
        a byte that says which, and the stream.
    """
    given = data.tobytes()
    found = [bytes([_STORED]) + given]
    # without matches: in what we store there are none, and looking for them is slow
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    found.append(bytes([_DEFLATE]) + deflate.compress(given) + deflate.flush())
    try:
        import zstandard
    except ImportError:
        pass
    else:
        compressor = zstandard.ZstdCompressor(1, write_content_size=False)
        found.append(bytes([_ZSTANDARD]) + compressor.compress(given))
    return min(found, key=len)


def unsqueeze(part: memoryview, count: int) -> np.ndarray:
    """The bytes again; never more than asked for are made.

    Args:
        part: what ``squeeze`` returned.
        count: how many bytes it holds.

    Returns:
        uint8, shape (count,).

    Raises:
        ArtifactError: if it is not such a stream of exactly that length, or needs zstandard.
    """
    method, stream = part[0] if part else None, part[1:]
    found: bytes | memoryview | None = None
    if method == _STORED:
        found = stream
    elif method == _DEFLATE:
        found = _inflate(stream, count)
    elif method == _ZSTANDARD:
        found = _unzstandard(stream, count)
    if found is None or len(found) != count:
        raise ArtifactError(f"the entropy-coded bytes are not {count} symbols")
    return np.frombuffer(found, np.uint8)


def _inflate(stream: memoryview, count: int) -> bytes | None:
    inflater = zlib.decompressobj(-15)
    try:
        found = inflater.decompress(stream, count + 1)
    except zlib.error:
        return None
    return found if inflater.eof and not inflater.unused_data and not inflater.unconsumed_tail else None


def _unzstandard(stream: memoryview, count: int) -> bytes | None:
    try:
        import zstandard
    except ImportError:
        raise ArtifactError("it needs zstandard to be read: pip install zstandard") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
    try:
        # a frame that says how long it is gets that much memory; extra data are found only if there is no more room
        if zstandard.get_frame_parameters(stream).content_size not in (zstandard.CONTENTSIZE_UNKNOWN, count):
            return None
        return decompressor.decompress(stream, max_output_size=count, allow_extra_data=False)
    except zstandard.ZstdError:
        return None


class Entropy(Codec):
    """Values of one byte, entropy-coded."""

    role = "values"
    level = "small"

    def bound(self, data: np.ndarray, layout: Layout) -> int | None:
        """Values of one byte."""
        return 1 if data.dtype.itemsize == 1 else None

    def encode(self, data: np.ndarray, layout: Layout) -> bytes:
        """Squeeze the bytes."""
        return squeeze(data)

    def decode(self, part: memoryview, layout: Layout) -> np.ndarray:
        """The bytes again."""
        if layout.bits.itemsize != 1:
            raise ArtifactError(f"entropy-coded bytes cannot stand for {layout.dtype} values")
        return unsqueeze(part, layout.count)
