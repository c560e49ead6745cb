"""A service on PostgreSQL: how its store is prepared, and what is wrong with one is told. Kills: test_acknowledged.py."""

from __future__ import annotations

from tests.mount.mounted import atoll
from tests.servers.postgresql import PostgreSQL


def test_a_store_is_prepared_once_and_what_is_wrong_is_one_line(own_postgresql: PostgreSQL) -> None:
    url = own_postgresql.url()
    unprepared = atoll("serve", "--listen", "127.0.0.1:0", "--store", url)
    assert unprepared.returncode == 1
    assert "was not prepared for AtollFS: run `atoll serve --init" in unprepared.stderr
    assert atoll("serve", "--init", "--store", url).returncode == 0
    assert atoll("serve", "--init", "--store", url).returncode == 1
    own_postgresql.stop()
    away = atoll("serve", "--listen", "127.0.0.1:0", "--store", url)
    assert away.returncode == 1
    assert len(away.stderr.splitlines()) == 1, away.stderr
    assert "see whether the server runs" in away.stderr
