"""The golden blocks of format version 1: what raw bytes each file in `golden/` was made of.

`python -m tests.chunkstore.golden_blocks DIRECTORY` writes them anew, for a new version of the format; those of a released
version never change.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from chunkstore.block import Codec, encode
from chunkstore.geometry import FRAME_BYTES

DIRECTORY: Final = Path(__file__).with_name("golden")


def _text(length: int) -> bytes:
    """Return text that shrinks well and has no short period."""
    lines = b"".join(b"step %d loss %d\n" % (n, n * n % 977) for n in range(length // 12 + 1))
    return lines[:length]


def _noise(length: int) -> bytes:
    """Return bytes that do not shrink."""
    return hashlib.shake_128(b"atoll").digest(length)


@dataclass(frozen=True, slots=True)
class Golden:
    """Name a file, its content, how it was encoded, and the digest that a chunk map would have for it."""

    name: str
    raw: bytes
    codec: str
    digest: str
    zstd_frames: tuple[bool, ...]

    @property
    def payload(self) -> bytes:
        """Read the file."""
        return (DIRECTORY / self.name).read_bytes()


GOLDEN: Final = (
    Golden("v1-raw-16-bytes.block", b"sixteen bytes...", "none", "7b6ccb30da84af33b70dc7dcadbea91b", (False,)),
    Golden("v1-raw-one-frame.block", _noise(1000), "zstd:1", "ad319ea4b8b1279d1342727431b138c7", (False,)),
    Golden(
        "v1-raw-two-frames.block", _text(FRAME_BYTES + 100), "none", "f38e0435b25952d664817adfa8aacdcb", (False, False)
    ),
    Golden("v1-zstd-one-frame.block", _text(20_000), "zstd:1", "e5117efd90e6ed6d7e396e0fa6c8089f", (True,)),
    Golden(
        "v1-zstd-three-frames.block",
        _text(2 * FRAME_BYTES) + _noise(777),
        "zstd:9",
        "3e9ee4c3cdc642dbdbc568c8afe45c39",
        (True, True, False),
    ),
)


def main() -> None:
    """Write all files."""
    for golden in GOLDEN:
        encoded = encode(golden.raw, codec=Codec.parse(golden.codec))
        (Path(sys.argv[1]) / golden.name).write_bytes(encoded.payload)
        sys.stdout.write(f"{golden.name} {encoded.digest.hex()}\n")


if __name__ == "__main__":
    main()
