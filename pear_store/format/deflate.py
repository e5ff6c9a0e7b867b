"""Manifests in few bytes: zlib streams with a preset dictionary, which is what manifests have in common.

A stream names its dictionary by a checksum, so what an earlier version wrote is read, too. A dictionary is part of the
formats that use it (docs/formats.md). It never changes; another one may follow it.
"""

import zlib

from pear_store.format.dictionaries import EARLIER, LATEST

_BY_CHECKSUM = {zlib.adler32(one).to_bytes(4, "big"): one for one in (*EARLIER, LATEST)}


def deflated(data: bytes) -> bytes:
    stream = zlib.compressobj(6, zlib.DEFLATED, _WINDOW_BITS, zdict=LATEST)
    return stream.compress(data) + stream.flush()


_WINDOW_BITS = 14  # enough for the dictionary and a manifest; with 15, a stream takes half as long again to set up


def inflated(stream: bytes, most_bytes: int) -> bytes:
    """What was deflated, or its first `most_bytes`.

    Raises:
        zlib.error: it is no such stream, or of a dictionary that this version does not know.
    """
    return zlib.decompressobj(zdict=_BY_CHECKSUM.get(stream[2:6], b"")).decompress(stream, most_bytes)
