"""Read files at random, over and over, past the page cache: `reader.py DIRECTORY SUMS SEED LOG STOP`.

SUMS is a JSON object of file names and SHA-256 sums. Whole files and parts are read; a wrong byte or an error ends the
program with a message and exit code 1. A line goes to LOG for each file read. Ends when the file STOP exists.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
from pathlib import Path


def main(directory: str, sums: str, seed: str, log: str, stop: str) -> None:
    """Read until told to stop."""
    expected: dict[str, str] = json.loads(Path(sums).read_text())
    rng = random.Random(seed)
    names = sorted(expected)
    with open(log, "w") as progress:
        while not Path(stop).exists():
            name = rng.choice(names)
            descriptor = os.open(os.path.join(directory, name), os.O_RDONLY)
            try:
                # Pages that an earlier round left would be read without asking the file system.
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                size_bytes = os.fstat(descriptor).st_size
                start = rng.randrange(size_bytes)
                part = os.pread(descriptor, 10_000, start)
                whole = b"".join(iter(lambda: os.read(descriptor, 1 << 20), b""))  # noqa: B023
            finally:
                os.close(descriptor)
            if hashlib.sha256(whole).hexdigest() != expected[name]:
                sys.exit(f"{name}: {len(whole)} of {size_bytes} bytes, with another sum than what was written")
            if part != whole[start : start + 10_000]:
                sys.exit(f"{name}: bytes from {start} on are not those of the whole file")
            progress.write(f"{name}\n")
            progress.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
