"""The SQLite store with a journal from the first commit on: the contract, and what becomes of journals."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.metasvc.store.contract import StoreContract
from tests.metasvc.store.sqlite_world import SqliteWorld


@pytest.fixture
def world(tmp_path: Path) -> SqliteWorld:
    return SqliteWorld(tmp_path, journal_after=0)


class TestSqliteStoreWithJournal(StoreContract):
    """The contract."""
