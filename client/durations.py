"""Times as users write them: ``30s``, ``10m``, ``1h``, ``7d``. Pure."""

from __future__ import annotations

import re
from typing import Final

_UNITS_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_DURATION: Final = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)([smhdw])", re.ASCII)
MAX_DURATION_S: Final = 36_500 * 86400


def parse_duration(text: str) -> float:
    """Return a time in seconds. ValueError, with the remedy, for anything else, and for more than a hundred years."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no time: give a number with s, m, h, d or w, for example 1h")
    seconds = float(match[1]) * _UNITS_S[match[2]]
    if seconds > MAX_DURATION_S:
        raise ValueError(f"{text!r} is too long: give at most 36500d")
    return seconds
