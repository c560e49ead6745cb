"""PostgreSQL's programs run where the tests find them, as a user that is not root."""

from __future__ import annotations

import os
import pwd
import subprocess
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.servers.postgresql import PASSWORD, ROLE, PostgreSQL


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


def test_a_server_keeps_its_port_and_data_over_kill_and_shutdown(own_postgresql: PostgreSQL) -> None:
    port = own_postgresql.port
    own_postgresql.sql("CREATE TABLE t AS SELECT 7 AS n")
    for end in (own_postgresql.kill, own_postgresql.stop):
        end()
        with pytest.raises(ProcessLookupError):
            _ = own_postgresql.pid
        own_postgresql.start()
        assert own_postgresql.port == port
        assert own_postgresql.sql("SELECT n FROM t") == "7\n"


def test_a_paused_server_answers_when_it_goes_on(own_postgresql: PostgreSQL) -> None:
    with own_postgresql.paused(), pytest.raises(subprocess.TimeoutExpired):
        own_postgresql.sql("SELECT 1", timeout_s=0.5)
    assert own_postgresql.sql("SELECT 1") == "1\n"


def test_the_role_comes_in_by_its_password_only(postgresql: PostgreSQL) -> None:
    psql: list[str | Path] = [postgresql._programs / "psql", "-X", "-A", "-t", "-c", "SELECT current_user"]
    good = subprocess.run([*psql, postgresql.url()], capture_output=True, text=True, timeout=30, check=True)
    assert good.stdout == f"{ROLE}\n"
    wrong = postgresql.url().replace(quote(PASSWORD, safe=""), "wrong")
    bad = subprocess.run([*psql, wrong], capture_output=True, text=True, timeout=30, check=False)
    assert bad.returncode != 0
    assert "password authentication failed" in bad.stderr
