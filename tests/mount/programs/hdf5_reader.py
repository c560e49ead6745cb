"""Read an HDF5 file while another process appends to it: `hdf5_reader.py FILE ROWS`.

Row i of the data set holds i, i + 1, … Prints `ready` once the file is open, and ends when all rows were seen. The mode of
HDF5 is SWMR: one writer, many readers, which relies on the order of writes being that of the file system.
"""

from __future__ import annotations

import sys
import time

import h5py  # type: ignore[import-untyped]
import numpy as np


def main(path: str, rows: int) -> None:
    """Refresh until `rows` rows were read and found right; AssertionError after a minute without a new one."""
    with h5py.File(path, "r", libver="latest", swmr=True) as file:
        data = file["data"]
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        seen = 0
        deadline = time.monotonic() + 60
        while seen < rows:
            data.refresh()
            if data.shape[0] > seen:
                fresh = data[seen:]
                expected = np.arange(seen, seen + len(fresh))[:, None] + np.arange(data.shape[1])[None, :]
                np.testing.assert_array_equal(fresh, expected)
                seen += len(fresh)
                deadline = time.monotonic() + 60
            assert time.monotonic() < deadline, f"{seen} of {rows} rows after a minute of waiting"


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
