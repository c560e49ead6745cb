"""What the comparison on names counts is what its servers did."""

import socket
import subprocess
from pathlib import Path

from bench.meta_stores import postgresql_store, processes_of, redis_store, server_cpu_s


def test_postgresql_counts_statements_and_transactions_that_wrote() -> None:
    with postgresql_store() as store:
        server = store.server  # type: ignore[attr-defined]
        assert server.sql("SHOW synchronous_commit").strip() == "on"
        assert server.sql("SHOW fsync").strip() == "on"
        statements, transactions = store.counts()
        server.sql("CREATE TABLE counted (value int)")
        before = store.counts()
        assert before[0] == statements + 1
        assert before[1] == transactions + 1
        for _ in range(3):
            server.sql("INSERT INTO counted VALUES (1)")
        server.sql("SELECT count(*) FROM counted")
        assert store.counts() == (before[0] + 4, before[1] + 3)
        server.sql("INSERT INTO counted SELECT generate_series(1, 300000)")
        assert server_cpu_s(store.pid) > 0


def test_redis_is_durable_and_counts_commands_and_transactions() -> None:
    with redis_store() as store:
        server = store.server  # type: ignore[attr-defined]
        assert server.command("CONFIG", "GET", "appendfsync") == [b"appendfsync", b"always"]
        before = store.counts()
        server.command("SET", "key", "value")
        server.command("EVAL", "return redis.call('SET', 'key', 'other')", 0)
        after = store.counts()
        assert after[1] == before[1] + 1
        # SET, EVAL and the SET of the script; a connection's greeting besides.
        assert after[0] >= before[0] + 3
        with socket.create_connection(("127.0.0.1", server.port), timeout=10):
            assert store.juicefs.endswith(f":{server.port}/1")


def test_processes_are_found_by_their_mount_point_however_their_arguments_are_written(tmp_path: Path) -> None:
    mountpoint = tmp_path / "mnt"
    arguments = [["mount", str(mountpoint)], [f"mount {mountpoint} rest"], [f"mount {mountpoint}-other"]]
    children = [subprocess.Popen(["bash", "-c", "read -r; exit 0", *each], stdin=subprocess.PIPE) for each in arguments]
    try:
        assert sorted(processes_of(mountpoint)) == sorted(child.pid for child in children[:2])
    finally:
        for child in children:
            child.communicate(b"\n", timeout=60)
