"""Map arrays into memory: `numpy_arrays.py write|verify DIRECTORY`, `write` once, `verify` as often as one likes.

A page that cannot be read ends the process with SIGBUS, so this is a process of its own. What the arrays hold follows from a
constant, so `verify` knows it too.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import numpy as np

SHAPE: Final = (3000, 2000)
"""48 MB of float64: several blocks, no multiple of one."""
CELL: Final = (1234, 55)


def expected() -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return what both files hold in the end."""
    values = np.random.default_rng(5).standard_normal(SHAPE)
    for row in changed_rows():
        values[row, ::7] = row
    values[CELL] = 42.5
    return values


def changed_rows() -> list[int]:
    """Return the rows that are changed after the first flush."""
    return [int(row) for row in np.random.default_rng(6).integers(0, SHAPE[0], 100)]


def write(directory: Path) -> None:
    """Make `array.bin` through a mapping, changed once more and from outside, and `saved.npy` as numpy saves."""
    path, values = directory / "array.bin", expected()
    writable = np.memmap(path, dtype=np.float64, mode="w+", shape=SHAPE)
    for start in range(0, SHAPE[0], 500):
        writable[start : start + 500] = 1.0
        writable[start : start + 500] = values[start : start + 500]
    for row in changed_rows():
        writable[row, ::7] = -1.0
    writable[CELL] = -1.0
    writable.flush()
    for row in changed_rows():
        writable[row, ::7] = row
    writable.flush()
    # What write(2) puts there must show in the mapping.
    with path.open("r+b") as file:
        file.seek(8 * (CELL[0] * SHAPE[1] + CELL[1]))
        file.write(np.float64(42.5).tobytes())
    assert writable[CELL] == 42.5
    del writable
    copied_on_write = np.memmap(path, dtype=np.float64, mode="c", shape=SHAPE)
    copied_on_write[:10] = 0.0
    del copied_on_write
    np.save(directory / "saved.npy", values)


def verify(directory: Path) -> None:
    """Read rows at random, as a training job does, then all."""
    values = expected()
    mapped = np.memmap(directory / "array.bin", dtype=np.float64, mode="r", shape=SHAPE)
    for row in np.random.default_rng().integers(0, SHAPE[0], 200):
        np.testing.assert_array_equal(mapped[row], values[row])
    np.testing.assert_array_equal(mapped, values)
    np.testing.assert_array_equal(np.load(directory / "saved.npy", mmap_mode="r"), values)


if __name__ == "__main__":
    {"write": write, "verify": verify}[sys.argv[1]](Path(sys.argv[2]))
