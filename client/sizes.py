"""Sizes as users write and read them: bytes, KiB to PiB (1024), kB to PB (1000).

Owns the spelling of sizes on the command line. Pure.
"""

from __future__ import annotations

import math
import re
from typing import Final

_BINARY: Final = {"K": 1, "M": 2, "G": 3, "T": 4, "P": 5}
_SIZE: Final = re.compile(
    r"(?P<whole>\d{1,20})(?:\.(?P<part>\d{1,6}))?\s*(?:(?P<letter>[kKMGTP])(?P<rest>iB|B)?|B)?", re.ASCII
)

# What fits a signed 64-bit column of every store.
MAX_SIZE_BYTES: Final = (1 << 63) - 1


def parse_size(text: str) -> int:
    """Return a size in bytes: ``4096``, ``64KiB``, ``1.5GiB`` (1024), ``10GB``, ``10kB`` (1000); K, M, G, T, P alone are 1024.

    ValueError, with the remedy, for anything else, for parts of a byte and for more than 2^63 - 1.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(
            f"{text!r} is no size: give bytes, or a number with KiB, MiB, GiB, TiB (1024) or kB, MB, GB, TB (1000)"
        )
    letter, rest = match["letter"], match["rest"]
    base = 1000 if rest == "B" else 1024
    if letter == "k" and rest != "B":
        raise ValueError(f"{text!r} is no size: write KiB for 1024 or kB for 1000 bytes")
    part = match["part"] or ""
    unit = math.prod([base] * (_BINARY[letter.upper()] if letter else 0))
    size, rest_of_byte = divmod(int(match["whole"] + part) * unit, int("1" + "0" * len(part)))
    if rest_of_byte:
        raise ValueError(f"{text!r} is no whole number of bytes: give a round figure")
    if size > MAX_SIZE_BYTES:
        raise ValueError(f"{text!r} is more than any volume holds: give at most 8191PiB")
    return size


def format_size(size_bytes: int) -> str:
    """Return a size for people: ``0 B``, ``1023 B``, ``1.5 KiB``, ``12.0 GiB``."""
    if abs(size_bytes) < 1024:
        return f"{size_bytes} B"
    value = float(size_bytes)
    units = ["EiB", "PiB", "TiB", "GiB", "MiB", "KiB"]
    value /= 1024
    # Not 1024: what would be rounded up to 1024.0 is 1.0 of the next unit.
    while abs(value) >= 1023.95:
        value /= 1024
        units.pop()
    return f"{value:.1f} {units[-1]}"
