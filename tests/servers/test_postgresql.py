"""PostgreSQL's programs run where the tests find them, as a user that is not root."""

from __future__ import annotations

import os
import pwd
import subprocess
from pathlib import Path

import pytest


@pytest.mark.parametrize("program", ["initdb", "pg_ctl", "postgres", "psql", "pgbench", "pg_amcheck", "pg_checksums"])
def test_anybody_may_run_each_program(program: str, postgresql_programs: Path) -> None:
    user = pwd.getpwnam("nobody") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    done = subprocess.run(
        [postgresql_programs / program, "--version"],
        cwd="/",
        user=user.pw_uid,
        group=user.pw_gid,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert "(PostgreSQL)" in done.stdout
