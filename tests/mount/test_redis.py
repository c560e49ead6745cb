"""A service on Redis, on real mounts: the death of the server and of the service is a pause, and nothing is lost."""

from __future__ import annotations

import random
from pathlib import Path

from tests.mount.mounted import atoll
from tests.mount.service import mounted_from, service
from tests.mount.writers import Writers
from tests.servers.redis import PASSWORD, Redis


def test_programs_go_on_when_the_server_or_the_service_is_killed(tmp_path: Path, own_redis: Redis, seed: int) -> None:
    rand = random.Random(seed)
    (tmp_path / "bucket").mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    with (
        service(tmp_path, store_url=own_redis.url()) as running,
        mounted_from(running, tmp_path, "--bucket", f"file://{tmp_path}/bucket") as volume,
    ):
        writers = Writers(volume.path, outside, count=2)
        writers.make_directories()
        for what in ("server", "service", "server"):
            with writers.working(rand.randrange(1 << 32)):
                writers.wait_for_steps(rand.randrange(10, 100))
                if what == "server":
                    own_redis.kill()
                    own_redis.start()
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
    assert "serving redis://" in said
    assert PASSWORD not in said
    assert own_redis.url().partition("@")[0].rpartition(":")[2] not in said


def test_a_store_is_prepared_once_and_what_is_wrong_is_one_line(own_redis: Redis) -> None:
    url = own_redis.url()
    unprepared = atoll("serve", "--listen", "127.0.0.1:0", "--store", url)
    assert unprepared.returncode == 1
    assert "was not prepared for AtollFS: run `atoll serve --init" in unprepared.stderr
    assert atoll("serve", "--init", "--store", url).returncode == 0
    assert atoll("serve", "--init", "--store", url).returncode == 1
    own_redis.command("CONFIG", "SET", "maxmemory", "1gb", "maxmemory-policy", "allkeys-lru")
    evicting = atoll("serve", "--listen", "127.0.0.1:0", "--store", url)
    assert evicting.returncode == 1
    assert len(evicting.stderr.splitlines()) == 1, evicting.stderr
    assert "set it to noeviction" in evicting.stderr
    own_redis.stop()
    away = atoll("serve", "--listen", "127.0.0.1:0", "--store", url)
    assert away.returncode == 1
    assert len(away.stderr.splitlines()) == 1, away.stderr
    assert "see whether the server runs" in away.stderr
