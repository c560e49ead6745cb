"""The setting of the C library that a mount makes: freed buffers stay with the process."""

from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
import sys
if sys.argv[1] == "keep":
    from chunkstore.allocator import keep_freed_memory
    keep_freed_memory()
for _ in range(3):
    buffers = [bytearray(b"x" * (4 << 20)) for _ in range(10)]
    del buffers
print(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])
"""


def test_freed_buffers_are_kept_for_the_next_ones() -> None:
    def resident_kib(word: str) -> int:
        command = [sys.executable, "-c", _PROGRAM, word]
        return int(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)

    # 40 MiB were held and freed.
    assert resident_kib("keep") - resident_kib("default") > 20 * 1024
