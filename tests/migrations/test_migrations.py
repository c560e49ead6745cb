"""The loader of the stores' schemas, and the files as they are."""

from __future__ import annotations

import sqlite3

import pytest

from migrations import apply, load_migrations, split_statements

DATABASES = ["sqlite", "postgresql"]


@pytest.mark.parametrize("database", DATABASES)
def test_migrations_are_numbered_from_one(database: str) -> None:
    migrations = load_migrations(database)
    assert [migration.number for migration in migrations] == list(range(1, len(migrations) + 1))
    assert migrations[0].file_name == "0001_volume.sql"


def test_migrations_of_sqlite_may_be_applied_twice() -> None:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    schemas = []
    for _ in range(2):
        for migration in load_migrations("sqlite"):
            apply(connection, migration)
        schemas.append(connection.execute("SELECT * FROM sqlite_schema ORDER BY name").fetchall())
    assert schemas[0] == schemas[1]
    connection.close()


@pytest.mark.parametrize("database", DATABASES)
def test_migrations_leave_transactions_and_settings_to_the_driver(database: str) -> None:
    for migration in load_migrations(database):
        for statement in migration.statements:
            code = [line for line in statement.splitlines() if line.strip() and not line.startswith("--")]
            assert code[0].split()[0] in {"CREATE", "ALTER", "DROP", "UPDATE", "INSERT", "DELETE"}


def test_an_unknown_database_has_no_migrations() -> None:
    with pytest.raises(FileNotFoundError):
        load_migrations("oracle")


@pytest.mark.parametrize(
    ("script", "statements"),
    [
        ("", 0),
        ("-- nothing; but a comment\n", 0),
        ("CREATE TABLE a (b);", 1),
        ("CREATE TABLE a (b); -- rest; of line\nCREATE TABLE c (d);\n-- end", 2),
        ("INSERT INTO a VALUES (';'), ('--');\n", 1),
        ("CREATE TABLE a ( -- one; two\n b);", 1),
        ("CREATE TRIGGER t AFTER INSERT ON a BEGIN DELETE FROM a; DELETE FROM b; END;\nDROP TABLE a;", 2),
    ],
)
def test_scripts_are_split_into_statements(script: str, statements: int) -> None:
    assert len(split_statements(script)) == statements


@pytest.mark.parametrize("script", ["CREATE TABLE a (b)", "DROP TABLE a; DROP TABLE", "SELECT 'x;"])
def test_a_script_that_ends_in_the_middle_is_refused(script: str) -> None:
    with pytest.raises(ValueError, match="not a complete SQL statement"):
        split_statements(script)
