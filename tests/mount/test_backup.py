"""A store that is lost, and the volume that comes back from its bucket: real mounts, services and SeaweedFS."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.mounted import COMMAND_TIMEOUT_S, MountedVolume, atoll, mounted
from tests.mount.service import service, services
from tests.mount.stores import about_embedded_volumes
from tests.mount.test_dump import Writer, check_contents, content_of
from tests.servers.buckets import Bucket
from tests.servers.faults import FaultProxy, Hang, LostAnswer
from tests.servers.ports import free_ports
from tests.servers.postgresql import PostgreSQL

OPTIONS = ("--backup", "1m")


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + COMMAND_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def backups(place: str, environment: dict[str, str]) -> list[dict[str, object]]:
    listed = atoll("backups", "list", place, "--json", environment=environment)
    assert listed.returncode == 0, listed
    found: list[dict[str, object]] = json.loads(listed.stdout)["backups"]
    return found


def age_backups(bucket: Bucket, seconds: int) -> None:
    """Make the backups of a bucket older, so that the next one is due."""
    store = bucket.store()
    for page in store.list("backups/manifests/"):
        for meta in page:
            manifest = json.loads(bytes(store.get(meta["path"]).bytes()))
            manifest["made_ns"] -= seconds * 10**9
            store.put(meta["path"], json.dumps(manifest).encode())


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_volume_whose_store_is_lost_comes_back_from_its_bucket(
    tmp_path: Path, bucket: Bucket, own_postgresql: PostgreSQL, kind: str
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    url = own_postgresql.url() if kind == "postgresql" else ""
    keys = dict(bucket.environment)
    with service(tmp_path / "one", store_url=url, options=OPTIONS, environment=keys) as lost:
        environment = {**keys, "ATOLL_TOKEN": lost.token}
        made = atoll("format", lost.address(), "--bucket", bucket.url, environment=environment)
        assert made.returncode == 0, made
        until(lambda: bool(backups(bucket.url, keys)), "the first backup")
        volume = MountedVolume(lost.address(), tmp_path / "mnt", tmp_path / "cache", environment)
        volume.path.mkdir()
        volume.cache_dir.mkdir()
        try:
            volume.mount()
            (volume.path / "early").write_bytes(content_of("early"))
            writer = Writer(volume.path)
            with writer.working():
                writer.wait_for(40)
                closed = list(writer.closed)
                # The next one is due: it is made while files are written.
                age_backups(bucket, 120)
                lost.kill()
                lost.start()
                until(lambda: len(backups(bucket.url, keys)) == 2, "the second backup")
                writer.wait_for(len(writer.closed) + 10)
            (volume.path / "early").unlink()
            assert [each["is_newest"] for each in backups(lost.address(), environment)] == [False, True]
        finally:
            volume.abandon()
        lost.kill()
    if kind == "postgresql":
        own_postgresql.kill()
        shutil.rmtree(own_postgresql.directory / "data")
    else:
        for path in (tmp_path / "one").glob("service.db*"):
            path.unlink()
    newest = backups(bucket.url, keys)[-1]
    with service(tmp_path / "two", options=OPTIONS, environment=keys) as fresh:
        environment = {**keys, "ATOLL_TOKEN": fresh.token}
        loaded = atoll("load", bucket.url, fresh.address(), "--json", environment=environment)
        assert loaded.returncode == 0, loaded
        document = json.loads(loaded.stdout)
        assert (document["backup"], document["format"]["bucket_url"]) == (newest["name"], bucket.url)
        back = MountedVolume(fresh.address(), tmp_path / "back", tmp_path / "back-cache", environment)
        back.path.mkdir()
        back.cache_dir.mkdir()
        try:
            back.mount()
            check_contents(back.path, closed)
            assert (back.path / "early").read_bytes() == content_of("early")
            more = Writer(back.path / "more")
            (back.path / "more").mkdir()
            with more.working():
                more.wait_for(20)
            back.remount_with_empty_cache()
            check_contents(back.path / "more", more.closed)
            check_contents(back.path, closed)
            back.unmount()
            back.atoll("fsck", "--data", back.address, timeout_s=120)
            # What was written after the backup belongs to nobody.
            assert back.document("gc", back.address)["leaked_objects"] > 0
            assert back.document("gc", back.address)["leaked_objects"] == 0
            back.atoll("fsck", "--data", back.address, timeout_s=120)
        finally:
            back.abandon()


@about_embedded_volumes
def test_an_embedded_volume_is_backed_up_by_its_mount_and_comes_back(tmp_path: Path, bucket: Bucket) -> None:
    [port] = free_ports(1)
    place, keys = tmp_path / "first", dict(bucket.environment)
    place.mkdir()
    options = (*OPTIONS, "--metrics", f"127.0.0.1:{port}")
    with mounted(place, "--bucket", bucket.url, mount_options=options, environment=keys) as volume:
        if volume.address.startswith("atoll://"):
            pytest.skip("this one is about embedded volumes")
        until(lambda: len(backups(volume.address, keys)) == 1, "the backup of the empty volume")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
            text = answer.read().decode()
        assert re.search(r"^atoll_meta_backups 1$", text, re.MULTILINE)
        assert re.search(r"^atoll_meta_backup_age_seconds \d", text, re.MULTILINE)
        (volume.path / "file").write_bytes(content_of("file"))
        age_backups(bucket, 120)
        volume.unmount()
        volume.mount(*options)
        until(lambda: len(backups(volume.address, keys)) == 2, "a backup with the file")
        # What the newest backup names stays, though it is removed for good.
        (volume.path / "file").unlink()
        volume.atoll("trash", "empty", volume.address)
        kept = volume.document("gc", volume.address)
        assert (kept["garbage_held"], kept["deleted_objects"]) == (True, 0)
        listed = atoll("backups", "list", volume.address, environment=keys)
        assert "or the next" in listed.stdout
    shutil.rmtree(volume.address)
    target = tmp_path / "back"
    loaded = atoll("load", bucket.url, str(target), environment=keys)
    assert loaded.returncode == 0, loaded
    assert atoll("fsck", "--data", str(target), environment=keys).returncode == 0
    info = atoll("info", f"{target}:/file", "--json", environment=keys)
    assert json.loads(info.stdout)["size_bytes"] == len(content_of("file"))


@about_embedded_volumes
def test_garbage_that_backups_need_goes_when_that_is_asked_for(tmp_path: Path) -> None:
    with mounted(tmp_path, "--trash-days", "0", mount_options=OPTIONS) as volume:
        if volume.address.startswith("atoll://"):
            pytest.skip("this one is about embedded volumes")
        (volume.path / "file").write_bytes(os.urandom(200_000))
        until(lambda: len(backups(volume.address, {})) == 1, "a backup")
        (volume.path / "file").unlink()
        assert volume.document("gc", volume.address)["garbage_held"]
        done = volume.document("gc", "--ignore-backups", volume.address)
        assert (done["garbage_held"], done["garbage_objects"]) == (False, 1)


def test_a_service_that_is_killed_in_a_backup_leaves_none_or_a_whole_one(
    tmp_path: Path, bucket: Bucket, fault_proxy: FaultProxy
) -> None:
    keys, near = dict(bucket.environment), bucket.at(fault_proxy.endpoint)
    manifests, parts = "backups/manifests/", "backups/parts/"
    with service(tmp_path, options=OPTIONS, environment=keys) as running:
        environment = {**keys, "ATOLL_TOKEN": running.token}
        made = atoll("format", running.address(), "--bucket", near.url, environment=environment)
        assert made.returncode == 0, made
        until(lambda: len(backups(bucket.url, keys)) == 1, "the first backup")
        running.kill()
        count = 1
        for fault, where, more in ((Hang(), parts, 0), (Hang(), manifests, 0), (LostAnswer(), manifests, 1)):
            fault_proxy.inject(fault, method="PUT", key=where)
            fault_proxy.forget_requests()
            # Only a service that is started then finds that one is due.
            age_backups(bucket, 120)
            running.start()
            until(lambda where=where: fault_proxy.count(method="PUT", key=where) > 0, "a request")  # type: ignore[misc]
            running.kill()
            fault_proxy.clear()
            count += more
            assert len(backups(bucket.url, keys)) == count
        age_backups(bucket, 120)
        before = {each["name"] for each in backups(bucket.url, keys)}
        running.start()
        # How many there are then is the ladder's affair.
        until(lambda: backups(bucket.url, keys)[-1]["name"] not in before, "the next backup")
    for each in backups(bucket.url, keys):
        copy = tmp_path / str(each["name"])
        loaded = atoll("load", bucket.url, str(copy), "--backup", str(each["name"]), environment=keys)
        assert loaded.returncode == 0, loaded
        assert atoll("fsck", str(copy), environment=keys).returncode == 0


def test_a_volume_that_changes_hands_in_a_backup_is_backed_up_by_the_next_owner(
    tmp_path: Path, bucket: Bucket, fault_proxy: FaultProxy
) -> None:
    keys, near = dict(bucket.environment), bucket.at(fault_proxy.endpoint)
    url = f"sqlite:///{tmp_path}/shared.db"
    with services(tmp_path, url, count=2, options=OPTIONS, environment=keys) as processes:
        fault_proxy.inject(Hang(), method="PUT", key="backups/parts/")
        environment = {**keys, "ATOLL_TOKEN": processes[0].token}
        made = atoll("format", processes[0].address(), "--bucket", near.url, environment=environment)
        assert made.returncode == 0, made
        until(lambda: fault_proxy.count(method="PUT", key="backups/parts/") > 0, "a backup that hangs")
        [owner] = [each for each in processes if "is open" in each.log_path.read_text()]
        [other] = [each for each in processes if each is not owner]
        owner.end()
        assert backups(bucket.url, keys) == []
        fault_proxy.clear()
        until(lambda: bool(backups(bucket.url, keys)), "a backup by the next owner")
        assert "backup made" in other.log_path.read_text()
        assert "backup made" not in owner.log_path.read_text()


@about_embedded_volumes
def test_commands_say_what_there_is_and_what_to_do(tmp_path: Path) -> None:
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    url = f"file://{bucket}"
    nothing = atoll("load", url, str(tmp_path / "copy"))
    assert nothing.returncode == 1
    assert f"there is no backup in {url}" in nothing.stderr
    assert atoll("backups", "list", url).stdout.splitlines()[0].startswith("NAME")
    (tmp_path / "one").mkdir()
    with mounted(tmp_path / "one", "--bucket", url, mount_options=OPTIONS) as one:
        if one.address.startswith("atoll://"):
            pytest.skip("this one is about embedded volumes")
        (tmp_path / "two").mkdir()
        with mounted(tmp_path / "two", "--bucket", url, mount_options=OPTIONS) as two:
            until(lambda: len(backups(url, {})) == 2, "two backups")
            [first] = backups(two.address, {})
    which = atoll("load", url, str(tmp_path / "copy"))
    assert which.returncode == 2
    assert "choose with --volume" in which.stderr
    absent = atoll("load", url, str(tmp_path / "copy"), "--backup", "20260101t000000z-00000000")
    assert "there is no backup 20260101t000000z-00000000" in absent.stderr
    refused = atoll("load", str(tmp_path / "file"), str(tmp_path / "copy"), "--backup", "latest")
    assert refused.returncode == 2
    chosen = atoll("load", url, str(tmp_path / "copy"), "--volume", str(first["uuid"]))
    assert chosen.returncode == 0, chosen
    assert atoll("fsck", str(tmp_path / "copy")).returncode == 0
    beside = atoll("mount", one.address, str(tmp_path / "one"), "--backup", "1h", "--read-only")
    assert (beside.returncode, len(beside.stderr.splitlines())) == (2, 1), beside
    for wrong in ("1", "0s", "1y", "10s", "8d"):
        bad = atoll("mount", one.address, str(tmp_path / "one"), "--backup", wrong)
        assert (bad.returncode, len(bad.stderr.splitlines())) == (2, 1), bad


@about_embedded_volumes
def test_slice_ids_of_a_restored_volume_begin_above_what_is_in_the_bucket(tmp_path: Path) -> None:
    bucket = tmp_path / "bucket"
    with mounted(tmp_path, "--bucket", f"file://{bucket}", "--create-bucket", mount_options=OPTIONS) as volume:
        if volume.address.startswith("atoll://"):
            pytest.skip("this one is about embedded volumes")
        until(lambda: len(backups(volume.address, {})) == 1, "a backup")
        uuid = volume.document("status", volume.address)["format"]["uuid"]
    # As if a volume whose clock was wrong had written it, long after the backup.
    late = 1 << 52
    path = bucket / uuid / f"{late >> 20:x}" / f"{late:x}.0"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"late")
    loaded = atoll("load", f"file://{bucket}", str(tmp_path / "copy"))
    assert loaded.returncode == 0, loaded
    with sqlite3.connect(tmp_path / "copy" / "meta.db") as database:
        [(next_slice,)] = database.execute("SELECT value FROM counter WHERE name = 'next_slice'").fetchall()
    assert next_slice > late
    assert atoll("gc", str(tmp_path / "copy")).returncode == 0
    assert not path.exists()


def test_backups_go_with_the_volume_that_is_deleted_and_stay_with_its_objects(tmp_path: Path) -> None:
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    with service(tmp_path, options=OPTIONS) as running:
        environment = {"ATOLL_TOKEN": running.token}
        for name in ("gone", "kept"):
            made = atoll("format", running.address(name), "--bucket", f"file://{bucket}", environment=environment)
            assert made.returncode == 0, made
        until(lambda: len(backups(f"file://{bucket}", {})) == 2, "a backup of each")
        assert atoll("delete", "--yes", running.address("gone"), environment=environment).returncode == 0
        kept = atoll("delete", "--yes", "--keep-objects", running.address("kept"), environment=environment)
        assert kept.returncode == 0, kept
        [left] = backups(f"file://{bucket}", {})
        assert left["volume"] == "acme/kept"
        parts = [path for path in (bucket / "backups" / "parts").rglob("*") if path.is_file()]
        assert {path.parent.name for path in parts} == {left["name"]}
        # It is the way back.
        loaded = atoll("load", f"file://{bucket}", running.address("kept"), environment=environment)
        assert loaded.returncode == 0, loaded
