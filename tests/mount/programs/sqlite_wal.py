"""Play one of several processes on one SQLite database in WAL mode: `sqlite_wal.py DATABASE NUMBER TRANSACTIONS`.

Each transaction moves money between two of 100 accounts and writes a line about it, so that the sum of all accounts stays
what it was, which each process verifies as it goes, and the number of lines tells that nothing was lost.
"""

from __future__ import annotations

import random
import sqlite3
import sys

ACCOUNTS = 100
START_BALANCE = 1000


def main(database: str, number: int, transactions: int) -> None:
    """Run the transactions; raises where the database shows anything that no order of transactions explains."""
    rng = random.Random(number)
    connection = sqlite3.connect(database, timeout=60, isolation_level=None)
    mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
    assert mode == "wal", mode
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA wal_autocheckpoint = 50")
    for step in range(transactions):
        source, target = rng.sample(range(ACCOUNTS), 2)
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("UPDATE account SET balance = balance - ? WHERE id = ?", (step, source))
        connection.execute("UPDATE account SET balance = balance + ? WHERE id = ?", (step, target))
        connection.execute(
            "INSERT INTO line (process, step, note) VALUES (?, ?, ?)", (number, step, rng.randbytes(300))
        )
        connection.execute("COMMIT")
        total, own = connection.execute(
            "SELECT (SELECT sum(balance) FROM account), (SELECT count(*) FROM line WHERE process = ?)", (number,)
        ).fetchone()
        assert total == ACCOUNTS * START_BALANCE, f"process {number} step {step}: the accounts hold {total}"
        assert own == step + 1, f"process {number} step {step}: {own} lines"
    connection.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
