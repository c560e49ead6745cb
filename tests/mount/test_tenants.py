"""Tenants and tokens, through the command line and mounts: each reaches what is meant for it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.mounted import ATOLL, MountedVolume, atoll, is_mount_point
from tests.mount.service import TENANT, ServiceProcess, mounted_from, service
from tests.servers.buckets import Bucket

SCRIPT = Path(__file__).parents[2] / "docs" / "guides" / "tenant.sh"


def test_the_life_of_a_tenant_as_the_guide_has_it(tmp_path: Path, bucket: Bucket) -> None:
    """The script of the guide, as it is, on a real S3 server: every command of it does what it says."""
    place, work = tmp_path / "service", tmp_path / "work"
    place.mkdir()
    work.mkdir()
    with service(place, environment=bucket.environment) as running:
        (tmp_path / "admin.token").write_text(running.token)
        environment = {
            **os.environ,
            **bucket.environment,
            "PATH": f"{Path(ATOLL).parent}:{os.environ['PATH']}",
            "ATOLL_SERVICE": f"atoll://127.0.0.1:{running.port}",
            "ADMIN_TOKEN_FILE": str(tmp_path / "admin.token"),
            "BUCKET": bucket.url,
            "WORK": str(work),
        }
        try:
            ended = subprocess.run(
                ["sh", str(SCRIPT)], env=environment, capture_output=True, text=True, check=False, timeout=300
            )
            said = ended.stdout + ended.stderr
            assert ended.returncode == 0, f"{said}\n{running.log_path.read_text()}"
        finally:
            if is_mount_point(work / "mnt"):
                subprocess.run(["umount", "-l", str(work / "mnt")], check=False, timeout=60)
        assert "hello\n" in ended.stdout
        assert "quota exceeded" in said
        assert "volume team/data is deleted, with " in said
        assert list(bucket.store().list().collect()) == []
        listed = atoll(
            "tenant", "list", environment["ATOLL_SERVICE"], "--json", environment={"ATOLL_TOKEN": running.token}
        )
        assert json.loads(listed.stdout) == {"tenants": []}
        audit = [line for line in running.log_path.read_text().splitlines() if " audit: " in line]
        for action in (
            "create tenant",
            "create token",
            "make team/data",
            "revoke token",
            "delete volume",
            "delete tenant",
        ):
            assert any(action in line for line in audit), action
        tokens = [(work / name).read_text().strip() for name in ("team.token", "user.token")]
        assert not any(token in running.log_path.read_text() for token in tokens)


@contextlib.contextmanager
def mounted_with(
    running: ServiceProcess,
    volume: MountedVolume,
    directory: Path,
    path: str = "",
    *options: str,
    mount: tuple[str, ...] = (),
) -> Iterator[MountedVolume]:
    """Mount a volume a second time, by a token that is made with these options."""
    made = atoll("token", "create", f"{running.address()}{path}", *options, environment={"ATOLL_TOKEN": running.token})
    assert made.returncode == 0, made
    for name in ("user", "user-cache"):
        (directory / name).mkdir()
    environment = {**volume.environment, "ATOLL_TOKEN": made.stdout.strip()}
    user = MountedVolume(running.address(), directory / "user", directory / "user-cache", environment)
    try:
        user.mount(*mount)
        yield user
        user.unmount()
    finally:
        user.abandon()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[tuple[ServiceProcess, MountedVolume]]:
    """Run a service with a mounted volume, in which is a directory for users and what is not for them."""
    place = tmp_path / "service"
    (place / "objects").mkdir(parents=True)
    with (
        service(place) as running,
        mounted_from(running, tmp_path, "--bucket", f"file://{place}/objects", "--trash-days", "0") as volume,
    ):
        (volume.path / "users" / "deep").mkdir(parents=True)
        (volume.path / "users" / "deep" / "file").write_bytes(b"for users")
        (volume.path / "secret").write_bytes(b"for nobody")
        (volume.path / "users" / "way-out").symlink_to("../secret")
        yield running, volume


def test_a_token_of_a_directory_shows_that_and_nothing_else(
    tmp_path: Path, world: tuple[ServiceProcess, MountedVolume]
) -> None:
    running, volume = world
    with mounted_with(running, volume, tmp_path, ":/users") as user:
        assert sorted(os.listdir(user.path)) == ["deep", "way-out"]
        assert (user.path / "deep" / "file").read_bytes() == b"for users"
        with pytest.raises(FileNotFoundError):
            (user.path / "way-out").read_bytes()
        big = os.urandom(1 << 20)
        (user.path / "deep" / "mine").write_bytes(big)
        assert (volume.path / "users" / "deep" / "mine").read_bytes() == big
        os.rename(user.path / "deep" / "mine", user.path / "mine")
        os.remove(user.path / "mine")
        # A file that is moved out is gone, also for who has it open.
        with open(user.path / "deep" / "file", "r+b") as file:
            os.rename(volume.path / "users" / "deep" / "file", volume.path / "taken")
            time.sleep(1.1)
            with pytest.raises(OSError):
                os.ftruncate(file.fileno(), 0)
        assert (volume.path / "taken").read_bytes() == b"for users"
        status = user.document("status", str(user.path))
        assert (status["sessions"], status["holder"]["mountpoint"]) == ([], str(user.path))


def test_a_read_only_token_makes_a_read_only_mount(tmp_path: Path, world: tuple[ServiceProcess, MountedVolume]) -> None:
    running, volume = world
    with mounted_with(running, volume, tmp_path, "", "--read-only") as user:
        assert (user.path / "users" / "deep" / "file").read_bytes() == b"for users"
        with pytest.raises(OSError) as refused:
            (user.path / "new").write_bytes(b"")
        assert refused.value.errno == errno.EROFS
        assert os.statvfs(user.path).f_flag & os.ST_RDONLY


def test_a_subdirectory_counts_from_what_the_token_reaches(
    tmp_path: Path, world: tuple[ServiceProcess, MountedVolume]
) -> None:
    running, volume = world
    with mounted_with(running, volume, tmp_path, ":/users", mount=("--subdir", "/deep")) as user:
        assert os.listdir(user.path) == ["file"]


def test_a_token_that_is_replaced_in_its_file_is_used_from_then_on(
    tmp_path: Path, world: tuple[ServiceProcess, MountedVolume]
) -> None:
    """As platforms do that rotate tokens: the mount goes on when the old one has expired."""
    running, volume = world
    file = tmp_path / "token"
    admin = {"ATOLL_TOKEN": running.token}

    def make(*options: str) -> None:
        made = atoll("token", "create", running.address(), *options, environment=admin)
        assert made.returncode == 0, made
        file.write_text(made.stdout)

    make("--expires", "6s")
    for name in ("user", "user-cache"):
        (tmp_path / name).mkdir()
    environment = {**volume.environment, "ATOLL_TOKEN": ""}
    user = MountedVolume(running.address(), tmp_path / "user", tmp_path / "user-cache", environment)
    try:
        user.mount("--token-file", str(file))
        make()
        for number in range(40):
            (user.path / f"{number}").write_bytes(b"%d" % number)
            time.sleep(0.25)
        assert len([name for name in os.listdir(volume.path) if name.isdigit()]) == 40
        user.unmount()
    finally:
        user.abandon()


def test_the_quota_of_a_tenant_is_told_by_write_and_shown(
    tmp_path: Path, world: tuple[ServiceProcess, MountedVolume]
) -> None:
    running, volume = world
    admin = {"ATOLL_TOKEN": running.token}
    service_address = f"atoll://127.0.0.1:{running.port}"
    assert (
        atoll("tenant", "quota", f"{service_address}/{TENANT}", "--capacity", "64MiB", environment=admin).returncode
        == 0
    )
    deadline = time.monotonic() + 30
    while os.statvfs(volume.path).f_blocks * os.statvfs(volume.path).f_frsize > 64 << 20:
        assert time.monotonic() < deadline, "the quota is not noticed"
        time.sleep(0.2)
    with open(volume.path / "big", "wb") as file, pytest.raises(OSError) as refused:
        file.writelines(os.urandom(1 << 20) for _ in range(100))
    assert refused.value.errno == errno.EDQUOT
    os.remove(volume.path / "big")
    (volume.path / "small").write_bytes(os.urandom(8 << 20))
    deadline = time.monotonic() + 30
    while True:
        (tenant,) = json.loads(atoll("tenant", "list", service_address, "--json", environment=admin).stdout)["tenants"]
        if 8 << 20 <= tenant["used_bytes"] < 70 << 20:
            break
        assert time.monotonic() < deadline, tenant
        time.sleep(0.2)
    assert (tenant["tenant"], tenant["max_bytes"], tenant["volumes"]) == (TENANT, 64 << 20, ["data"])


def test_a_lost_admin_token_is_replaced_by_who_has_the_store(tmp_path: Path) -> None:
    with service(tmp_path) as running:
        listed = json.loads(
            atoll(
                "token",
                "list",
                f"atoll://127.0.0.1:{running.port}",
                "--json",
                environment={"ATOLL_TOKEN": running.token},
            ).stdout
        )
        (first,) = listed["tokens"]
        address = f"atoll://127.0.0.1:{running.port}"
        revoked = atoll("token", "revoke", address, first["id"], environment={"ATOLL_TOKEN": running.token})
        assert revoked.returncode == 0, revoked
        refused = atoll("tenant", "list", address, environment={"ATOLL_TOKEN": running.token})
        assert refused.returncode == 1
        assert "revoked" in refused.stderr
        another = atoll("serve", "--store", running.store, "--new-admin-token")
        assert another.returncode == 0, another
        assert atoll("tenant", "list", address, environment={"ATOLL_TOKEN": another.stdout.strip()}).returncode == 0
