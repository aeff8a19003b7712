"""A grid of numbers as a PNG: one colour, the more of it the larger the number, on whatever the page has behind it.

As the specification has it: an image of indices (colour type 3), a palette of one colour, and how opaque each entry is (tRNS).
"""

import struct
import zlib
from base64 import b64encode

import numpy as np
from numpy.typing import NDArray

SIGNATURE = b"\x89PNG\r\n\x1a\n"
LEVELS = 256


def png(shares: NDArray[np.float64], colour: tuple[int, int, int]) -> bytes:
    """Return a grid of numbers from 0 (transparent) to 1 (opaque) as a PNG of a pixel each."""
    rows, columns = shares.shape
    levels = np.rint(np.clip(shares, 0, 1) * (LEVELS - 1)).astype(np.uint8)
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), levels], axis=1)  # each begins with its filter: none
    head = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    parts = (
        (b"IHDR", head),
        (b"PLTE", bytes(colour) * LEVELS),
        (b"tRNS", bytes(range(LEVELS))),
        (b"IDAT", zlib.compress(lines.tobytes(), 9)),
        (b"IEND", b""),
    )
    return SIGNATURE + b"".join(_chunk(kind, data) for kind, data in parts)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def url(data: bytes) -> str:
    """Return an image as a URL that holds it."""
    return f"data:image/png;base64,{b64encode(data).decode()}"
