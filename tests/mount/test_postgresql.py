"""A service on PostgreSQL, on real mounts: the death of the database and of the service is a pause, and nothing is lost."""

from __future__ import annotations

import random
from pathlib import Path

from tests.mount.mounted import atoll
from tests.mount.service import mounted_from, service
from tests.mount.writers import Writers
from tests.servers.postgresql import PASSWORD, PostgreSQL


def test_programs_go_on_when_the_database_or_the_service_is_killed(
    tmp_path: Path, own_postgresql: PostgreSQL, seed: int
) -> None:
    rand = random.Random(seed)
    (tmp_path / "bucket").mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    with (
        service(tmp_path, store_url=own_postgresql.url()) as running,
        mounted_from(running, tmp_path, "--bucket", f"file://{tmp_path}/bucket") as volume,
    ):
        writers = Writers(volume.path, outside, count=2)
        writers.make_directories()
        for what in ("database", "service", "database"):
            with writers.working(rand.randrange(1 << 32)):
                writers.wait_for_steps(rand.randrange(10, 100))
                if what == "database":
                    own_postgresql.kill()
                    own_postgresql.start()
                else:
                    # The ownership of the dead one runs out meanwhile.
                    running.kill()
                    running.start()
                writers.wait_for_steps(writers.steps() + 20)
                writers.stop_file.touch()
                exit_codes = writers.wait_for_end()
                logs = writers.logs()
            assert set(exit_codes) == {0}, [log.message for log in logs]
            assert {log.errno for log in logs} == {None}, [log.message for log in logs]
            writers.settle()
        writers.verify()
        volume.remount_with_empty_cache()
        writers.verify()
    said = running.log_path.read_text()
    assert "serving postgresql://" in said
    assert PASSWORD not in said
    assert own_postgresql.url().partition("@")[0].rpartition(":")[2] not in said


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
