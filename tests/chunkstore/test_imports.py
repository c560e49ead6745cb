"""What a command pays for an import of ours: the libraries of native code come only when they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module", ["chunkstore", "chunkstore.errors", "chunkstore.geometry", "chunkstore.buckets", "chunkstore.buckets.url"]
)
def test_importing_it_loads_no_heavy_library(module: str) -> None:
    program = (
        f"import sys, {module}; print(*sorted({{'obstore', 'blake3', 'zstandard', 'asyncio'}} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.split() == []


def test_opening_a_directory_loads_no_obstore() -> None:
    program = (
        "import sys; from chunkstore.buckets import open_bucket; open_bucket('file:///tmp', env={});"
        "assert 'obstore' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], timeout=60, check=True)
