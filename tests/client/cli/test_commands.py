"""Every command end to end: on a volume that nobody holds, and through the mount that holds it, with equal results."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from client.cli.main import COMMANDS
from tests.client.cli.commands import done, run
from tests.mount.mounted import ATOLL, MountedVolume, detach, is_mount_point, mounted, wait_until_gone
from tests.servers.seaweedfs import SeaweedFS

MIB = 1 << 20


class Asking:
    """Ask a volume through its holder, or while nobody holds it; mounts and unmounts only where that changes."""

    def __init__(self, volume: MountedVolume, *, is_free: bool) -> None:
        self.volume = volume
        self.address = volume.address
        self._is_free = is_free

    @property
    def top(self) -> Path:
        """Return the mount point, mounted."""
        if not is_mount_point(self.volume.path):
            self.volume.mount()
        return self.volume.path

    def __call__(self, *arguments: str) -> dict[str, Any]:
        """Run a command and return its document."""
        if is_mount_point(self.volume.path) == self._is_free:
            if self._is_free:
                self.volume.unmount()
            else:
                self.volume.mount()
        return self.volume.document(*arguments)


@pytest.fixture(params=["held", "free"])
def ask(mounted_volume: MountedVolume, request: pytest.FixtureRequest) -> Asking:
    return Asking(mounted_volume, is_free=request.param == "free")


def ask_both(volume: MountedVolume, *commands: list[str]) -> list[dict[str, Any]]:
    """Return the documents of commands that change nothing; they must be the same with and without a holder."""
    held = [Asking(volume, is_free=False)(*command) for command in commands]
    free = [Asking(volume, is_free=True)(*command) for command in commands]
    assert free == held
    volume.mount()
    return held


def make_tree(top: Path) -> None:
    """Make a file of blocks, an inline one, one with a hole and two names, a link, and a name that is no UTF-8."""
    (top / "dir").mkdir()
    (top / "dir" / "big").write_bytes(os.urandom(5 * MIB))
    (top / "dir" / "small").write_bytes(b"small")
    with open(top / "holes", "wb") as file:
        file.seek(3 * MIB)
        file.write(b"end")
    os.link(top / "holes", top / "dir" / "other name")
    (top / "link").symlink_to("dir/big")
    with open(os.fsencode(top) + b"/not utf-8 \xff", "wb") as raw:
        raw.write(b"x")


# -- asking -----------------------------------------------------------------------------------------------------------------


def test_status_tells_volume_usage_and_holder(mounted_volume: MountedVolume) -> None:
    volume = mounted_volume
    make_tree(volume.path)
    held = volume.document("status", volume.address)
    assert held["holder"]["pid"] == volume.pid
    assert held["holder"]["mountpoint"] == str(volume.path)
    assert held["holder"]["phase"] == "mounted"
    assert [(row["pid"], row["mountpoint"]) for row in held["sessions"]] == [(volume.pid, str(volume.path))]
    assert held["cache"]["directory"].startswith(str(volume.cache_dir))
    assert held["usage"]["used_inodes"] == 7
    assert held["usage"]["used_bytes"] == 5 * MIB + 4096 + (3 * MIB + 4096) + 4096
    volume.unmount()
    free = volume.document("status", volume.address)
    assert (free["holder"], free["sessions"], free["cache"]) == (None, [], None)
    assert free["epoch"] > held["epoch"]
    assert (free["format"], free["usage"], free["trash"]) == (held["format"], held["usage"], held["trash"])
    assert done("status", volume.address).stdout.startswith("volume")
    volume.mount()
    assert str(volume.path) in done("status", volume.address).stdout
    # A path under the mount stands for its volume.
    assert volume.document("status", str(volume.path / "dir"))["address"] == volume.address


def test_info_of_files_directories_and_links(mounted_volume: MountedVolume) -> None:
    volume = mounted_volume
    make_tree(volume.path)
    paths = ["dir/big", "holes", "dir/./small/../small", "", "not utf-8 \udcff", "link"]
    big, holes, small, tree, raw, link = ask_both(volume, *(["info", f"{volume.address}:/{path}"] for path in paths))
    assert (big["type"], big["size_bytes"], big["durability"], big["slice_count"]) == ("file", 5 * MIB, "object", 1)
    assert big["slices"][0]["objects"] == 2
    assert (Path(volume.address) / "objects" / big["slices"][0]["first_object"]).exists()
    assert volume.document("info", str(volume.path / "dir" / "big")) == big
    assert (link["type"], link["target"]) == ("symlink", "dir/big")
    assert volume.document("info", str(volume.path / "link")) == link
    assert sorted(holes["paths"]) == ["/dir/other name", "/holes"]
    assert (small["durability"], small["slices"][0]["objects"]) == ("inline", 0)
    assert (tree["entries"], tree["usage"]["files"], tree["usage"]["directories"]) == (4, 6, 2)
    assert raw["path"] == "/not utf-8 \udcff"
    assert "/not utf-8 \\xff" in done("info", f"{volume.address}:/not utf-8 \udcff").stdout


def test_stats_are_prometheus_text_and_one_object(mounted_volume: MountedVolume) -> None:
    volume = mounted_volume
    make_tree(volume.path)
    text = volume.atoll("stats", str(volume.path))
    assert re.search(r'^atoll_fuse_requests_total\{op="WRITE"\} [1-9]', text, re.MULTILINE)
    assert re.search(r'^atoll_bucket_requests_total\{verb="put"\} 2$', text, re.MULTILINE)
    names = {line.split(" ")[0].partition("{")[0] for line in text.splitlines() if not line.startswith("#")}
    assert all(name.startswith("atoll_") for name in names)
    document = volume.document("stats", volume.address)
    assert document['atoll_fuse_requests_total{op="MKDIR"}'] == 1
    virtual = (volume.path / ".atoll" / "stats").read_text()
    assert names <= {line.split(" ")[0].partition("{")[0] for line in virtual.splitlines()}
    config = json.loads((volume.path / ".atoll" / "config").read_bytes())
    assert config["mount"]["pid"] == volume.pid
    volume.unmount()
    assert volume.document("stats", volume.address)["atoll_meta_operations_total"] >= 0


def test_figures_of_stats_that_are_no_numbers_are_read() -> None:
    from client.admin.stats import parse_metrics

    text = '# TYPE a counter\na{x="y z"} 3\nb 0.5\nc NaN\nd +Inf\n\n'
    found = parse_metrics(text)
    assert (found['a{x="y z"}'], found["b"], found["d"]) == (3, 0.5, float("inf"))
    assert found["c"] != found["c"]


# -- trash, quota, clone ----------------------------------------------------------------------------------------------------


def test_trash_is_listed_restored_and_emptied(ask: Asking) -> None:
    make_tree(ask.top)
    content = (ask.top / "dir" / "big").read_bytes()
    (ask.top / "dir" / "small").unlink()
    # The kernel knows from now on that the name is absent; a restore must tell it otherwise.
    assert not (ask.top / "dir" / "small").exists()
    shutil.rmtree(ask.top / "dir")
    (ask.top / "link").unlink()
    entries = ask("trash", "list", ask.address)["entries"]
    assert [(row["name"], row["type"]) for row in entries if row["path"] is not None][-2:] == [
        ("dir", "directory"),
        ("link", "symlink"),
    ]
    ids = {row["name"]: row["trash_id"] for row in entries}
    assert "link" in done("trash", "list", ask.address).stdout
    restored = ask("trash", "restore", ask.address, str(ids["big"]), str(ids["small"]))["restored"]
    assert [row["path"] for row in restored] == ["/dir/big", "/dir/small"]
    assert (ask.top / "dir" / "big").read_bytes() == content
    assert (ask.top / "dir" / "small").read_bytes() == b"small"
    # A name of a file that has another is no loss, so it is not in the trash.
    (ask.top / "dir" / "small").unlink()
    below = ask("trash", "list", f"{ask.address}:/dir")["entries"]
    assert [row["path"] for row in below] == ["/dir/small"]
    (ask.top / "link").touch()
    line = run("trash", "restore", ask.address, str(ids["link"])).error()
    assert "rename or remove what has its name now" in line
    assert ask("trash", "empty", ask.address, "--older-than", "1")["removed_entries"] == 0
    assert ask("trash", "empty", ask.address)["removed_entries"] >= 2
    assert ask("trash", "list", ask.address)["entries"] == []
    assert ask("gc", ask.address)["leaked_objects"] == 0


def test_a_tree_that_was_removed_comes_back_by_its_one_name(ask: Asking) -> None:
    tree = ask.top / "tree"
    (tree / "deep" / "deeper").mkdir(parents=True)
    files = {tree / "a": b"a", tree / "deep" / "b": b"b" * 100_000, tree / "deep" / "deeper" / "c": b"c"}
    for path, content in files.items():
        path.write_bytes(b"older")
        path.unlink()
        path.write_bytes(content)
    shutil.rmtree(tree)
    entries = ask("trash", "list", f"{ask.address}:/tree")["entries"]
    assert {row["path"] for row in entries} == {
        "/tree/a",
        "/tree/deep",
        "/tree/deep/b",
        "/tree/deep/deeper",
        "/tree/deep/deeper/c",
    }
    (top,) = [row for row in ask("trash", "list", ask.address)["entries"] if row["path"] == "/tree"]
    restored = ask("trash", "restore", ask.address, str(top["trash_id"]))
    assert len(restored["restored"]) == 6
    assert restored["left_entries"] == 3, "older files of the same names"
    assert ask.top == tree.parent
    for path, content in files.items():
        assert path.read_bytes() == content
    # By all that a list shows, in its order: what came back with something else is no error.
    shutil.rmtree(tree)
    rows = [row for row in ask("trash", "list", ask.address)["entries"] if row["size_bytes"] != len(b"older")]
    ask("trash", "restore", ask.address, *(str(row["trash_id"]) for row in rows))
    assert ask.top == tree.parent
    for path, content in files.items():
        assert path.read_bytes() == content


def test_quotas_are_set_shown_and_removed(ask: Asking) -> None:
    make_tree(ask.top)
    limited = f"{ask.address}:/dir"
    set_now = ask("quota", "set", limited, "--capacity", "20MiB")
    used = 5 * MIB + 4096 + 3 * MIB + 4096
    assert (set_now["capacity_bytes"], set_now["used_bytes"], set_now["used_inodes"]) == (20 * MIB, used, 3)
    changed = ask("quota", "set", limited, "--inodes", "10")
    assert (changed["capacity_bytes"], changed["max_inodes"]) == (20 * MIB, 10)
    assert ask("quota", "get", limited) == changed
    ask("quota", "set", f"{ask.address}:/", "--capacity", "1GiB")
    rows = ask("quota", "list", ask.address)["quotas"]
    assert [(row["path"], row["capacity_bytes"]) for row in rows] == [("/", 1 << 30), ("/dir", 20 * MIB)]
    assert "1.0 GiB" in done("quota", "list", ask.address).stdout
    assert ask("quota", "remove", limited)["path"] == "/dir"
    assert "has no quota of its own" in run("quota", "get", limited).error()
    assert "has no quota of its own" in run("quota", "remove", limited).error()


def test_a_clone_has_equal_content_and_is_independent(ask: Asking) -> None:
    make_tree(ask.top)
    assert not (ask.top / "copy").exists()
    usage = ask("clone", f"{ask.address}:/dir", f"{ask.address}:/copy")
    assert (usage["files"], usage["directories"], usage["path"]) == (3, 1, "/copy")
    for name in ("big", "small", "other name"):
        assert (ask.top / "copy" / name).read_bytes() == (ask.top / "dir" / name).read_bytes()
    (ask.top / "copy" / "big").write_bytes(b"changed")
    assert (ask.top / "dir" / "big").stat().st_size == 5 * MIB
    assert "choose a name that is free" in run("clone", f"{ask.address}:/dir", f"{ask.address}:/copy").error()


def test_a_clone_by_paths_of_the_mount_takes_along_what_is_still_being_written(mounted_volume: MountedVolume) -> None:
    top = mounted_volume.path
    with open(top / "open", "wb", buffering=0) as file:
        file.write(b"not closed yet")
        done("clone", top / "open", top / "copy")
        assert (top / "copy").read_bytes() == b"not closed yet"


# -- gc and fsck ------------------------------------------------------------------------------------------------------------


def blocks(address: str) -> list[Path]:
    return sorted(path for path in (Path(address) / "objects").rglob("*") if path.is_file())


def test_gc_deletes_what_leaked_and_nothing_else_and_finds_nothing_the_second_time(ask: Asking) -> None:
    (ask.top / "kept").write_bytes(os.urandom(9 * MIB))
    kept = blocks(ask.address)
    prefix = kept[0].parent
    for name in ("ffff0.0", "ffff0.1", "ffff1.0", kept[0].name.partition(".")[0] + ".77"):
        (prefix / name).write_bytes(b"left by a writer that died")
    (prefix / "not a block").write_bytes(b"somebody else's")
    dry = ask("gc", ask.address, "--dry-run")
    assert (dry["leaked_objects"], dry["deleted_objects"], dry["foreign_objects"]) == (4, 0, 1)
    assert len(blocks(ask.address)) == len(kept) + 5
    first = ask("gc", ask.address)
    assert (first["leaked_objects"], first["deleted_objects"], first["leaked_bytes"]) == (4, 4, 4 * 26)
    second = ask("gc", ask.address)
    assert (second["leaked_objects"], second["deleted_objects"]) == (0, 0)
    assert [path for path in blocks(ask.address) if path.name != "not a block"] == kept
    assert "leaked: 0 objects" in done("gc", ask.address).stdout


def test_gc_leaves_alone_what_a_program_is_just_writing(mounted_volume: MountedVolume) -> None:
    volume = mounted_volume
    content = os.urandom(9 * MIB)
    with open(volume.path / "file", "wb", buffering=0) as file:
        file.write(content)
        # Full blocks are uploaded while the file is open; no row knows them yet.
        deadline = threading.Event()
        while not blocks(volume.address):
            deadline.wait(0.01)
        assert volume.document("gc", volume.address)["leaked_objects"] == 0
    volume.remount_with_empty_cache()
    assert (volume.path / "file").read_bytes() == content


def test_removed_files_leave_the_bucket(ask: Asking) -> None:
    (ask.top / "file").write_bytes(os.urandom(9 * MIB))
    (ask.top / "file").unlink()
    assert ask("gc", ask.address)["garbage_slices"] == 0
    assert len(blocks(ask.address)) == 3
    ask("trash", "empty", ask.address)
    ask("gc", ask.address)
    assert blocks(ask.address) == []


def test_fsck_is_clean_and_finds_what_is_missing(ask: Asking) -> None:
    make_tree(ask.top)
    clean = ask("fsck", ask.address, "--data")
    assert (clean["clean"], clean["problem_count"], clean["checked_slices"]) == (True, 0, 1)
    assert clean["checked_objects"] == clean["verified_objects"] == 2
    lost = blocks(ask.address)[1]
    content = lost.read_bytes()
    lost.unlink()
    found = run("fsck", ask.address, "--json")
    assert (found.code, found.document["clean"]) == (1, False)
    assert [(row["code"], row["files"][0]["paths"]) for row in found.document["problems"]] == [
        ("object-missing", ["/dir/big"])
    ]
    assert "/dir/big" in run("fsck", ask.address).stdout
    lost.write_bytes(content[:-1])
    assert run("fsck", ask.address, "--json").document["clean"] is True  # still a plausible size
    assert [row["code"] for row in run("fsck", ask.address, "--data", "--json").document["problems"]] == [
        "object-corrupt"
    ]
    lost.write_bytes(b"tiny")
    assert [row["code"] for row in run("fsck", ask.address, "--json").document["problems"]] == ["object-size"]
    lost.write_bytes(content)


def test_staged_data_of_a_killed_mount_are_no_loss_and_are_uploaded_by_the_next(tmp_path: Path) -> None:
    """The bucket is out of reach while a mount with durability local writes, and that mount is killed."""
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    away = tmp_path / "away"
    with mounted(tmp_path, "--bucket", f"file://{bucket}", mount_options=["--durability", "local"]) as volume:
        content = os.urandom(5 * MIB)
        bucket.rename(away)
        (volume.path / "file").write_bytes(content)
        assert os.getxattr(volume.path / "file", "user.atoll.durability") == b"local"
        assert volume.document("status", volume.address)["staging"]["pending_bytes"] == 5 * MIB
        volume.kill_daemon()
        away.rename(bucket)
        free = volume.document("status", volume.address)
        assert free["staging"] == {"pending_bytes": 5 * MIB, "cache_dir": str(volume.cache_dir)}
        checked = volume.document("fsck", volume.address)
        assert (checked["clean"], checked["staged_slices"]) == (True, 1)
        volume.mount("--durability", "local")
        assert (volume.path / "file").read_bytes() == content
        volume.unmount()
        assert volume.document("status", volume.address)["staging"]["pending_bytes"] == 0
        assert volume.document("fsck", volume.address, "--data")["verified_objects"] == 2
        volume.mount()


# -- format, mount, umount --------------------------------------------------------------------------------------------------


def test_format_takes_its_options(tmp_path: Path) -> None:
    options = ["--block-size", "64KiB", "--compression", "none", "--capacity", "1GB", "--inodes", "1000"]
    made = done("format", tmp_path / "v", *options, "--trash-days", "0.5", "--inline-limit", "4KiB", "--json").document
    volume_format = done("status", tmp_path / "v", "--json").document["format"]
    assert made == {"address": str(tmp_path / "v"), "format": volume_format}
    assert volume_format["block_size_bytes"] == 64 << 10
    assert volume_format["compression"] == "none"
    assert volume_format["capacity_bytes"] == 10**9
    assert volume_format["max_inodes"] == 1000
    assert volume_format["trash_days"] == 0.5
    assert volume_format["inline_limit_bytes"] == 4096
    assert stat.S_IMODE((tmp_path / "v").stat().st_mode) == 0o700
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v"]


def test_format_makes_a_missing_bucket_directory_only_when_asked(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/deep/bucket"
    assert "--create-bucket" in run("format", tmp_path / "v", "--bucket", url).error()
    said = done("format", tmp_path / "v", "--bucket", url, "--create-bucket").stdout
    assert "every node that mounts the volume must reach the directory" in said
    assert done("fsck", tmp_path / "v").code == 0


def test_format_makes_a_bucket_on_s3_when_asked_and_a_volume_in_it_works(tmp_path: Path, s3_server: SeaweedFS) -> None:
    name = "atoll-made-by-format"
    bucket = s3_server.bucket(name, prefix="deep/prefix")
    refused = run("format", tmp_path / "volume", "--bucket", bucket.url, environment=bucket.environment).error()
    assert name in refused
    options = ("--bucket", bucket.url, "--create-bucket")
    with mounted(tmp_path, *options, environment=bucket.environment) as volume:
        content = os.urandom(5 * MIB)
        (volume.path / "file").write_bytes(content)
        volume.remount_with_empty_cache()
        assert (volume.path / "file").read_bytes() == content
        assert len(bucket.keys()) == 2
        document = volume.document("gc", volume.address)
        assert (document["listed_objects"], document["leaked_objects"]) == (2, 0)
        volume.unmount()
        assert volume.document("fsck", volume.address, "--data")["verified_objects"] == 2
    s3_server.delete_bucket(name)


def test_format_fills_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    done("format", tmp_path / "v")
    assert {path.name for path in (tmp_path / "v").iterdir()} >= {"meta.db", "objects"}


@pytest.mark.parametrize(
    "name", ["with blank", "comma,and=more", "ünïcode", "percent%20?query#x", "back\\slash", "col:on"]
)
def test_volumes_and_mount_points_may_have_any_name(tmp_path: Path, name: str) -> None:
    directory = tmp_path / name
    directory.mkdir()
    with mounted(directory) as volume:
        (volume.path / "file").write_bytes(b"x" * MIB)
        inner = volume.path / name
        inner.mkdir()
        assert volume.document("info", str(inner))["path"] == f"/{name}"
        assert volume.document("status", volume.address)["holder"]["mountpoint"] == str(volume.path)


def test_an_address_deeper_than_a_socket_address_works(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    with mounted(deep) as volume:
        (volume.path / "file").touch()
        assert volume.document("status", volume.address)["holder"]["pid"] == volume.pid


def test_a_mount_of_a_subdirectory_shows_only_that(tmp_path: Path) -> None:
    with mounted(tmp_path) as volume:
        make_tree(volume.path)
        (volume.path / "dir" / "up").symlink_to("../holes")
        volume.unmount()
        volume.mount("--subdir", "/dir")
        top = volume.path
        assert sorted(os.listdir(top)) == ["big", "other name", "small", "up"]
        assert not (top / "..").joinpath("holes").exists()
        assert not (top / "up").exists()
        assert volume.document("info", str(top / "big"))["path"] == "/dir/big"
        assert volume.document("info", str(top))["path"] == "/dir"
        done("clone", top / "small", top / "copy")
        assert (top / "copy").read_bytes() == b"small"
        done("quota", "set", top, "--capacity", "64MiB")
        assert volume.document("quota", "get", f"{volume.address}:/dir")["capacity_bytes"] == 64 * MIB
        (top / "small").unlink()
        (entry,) = volume.document("trash", "list", str(top))["entries"]
        done("trash", "restore", top, str(entry["trash_id"]))
        assert (top / "small").read_bytes() == b"small"
        assert volume.document("status", str(top))["holder"]["subdir"] == "/dir"
        volume.unmount()
        volume.mount()


def test_a_read_only_mount_refuses_changes(tmp_path: Path) -> None:
    with mounted(tmp_path) as volume:
        (volume.path / "file").write_bytes(b"x")
        volume.unmount()
        volume.mount("--read-only")
        assert (volume.path / "file").read_bytes() == b"x"
        for change in (
            lambda: (volume.path / "file").write_bytes(b"y"),
            lambda: (volume.path / "new").touch(),
            lambda: (volume.path / "file").unlink(),
        ):
            with pytest.raises(OSError, match="Read-only file system"):
                change()


def test_a_mount_in_the_foreground_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    done("format", tmp_path / "v")
    for name in ("mnt", "cache"):
        (tmp_path / name).mkdir()
    command = f"{ATOLL} mount -f {tmp_path}/v {tmp_path}/mnt --cache-dir {tmp_path}/cache --log-format json"
    with subprocess.Popen(command.split(), stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = json.loads(process.stderr.readline())
            assert (line["event"], line["volume"], line["pid"]) == ("mounted", str(tmp_path / "v"), process.pid)
            (tmp_path / "mnt" / "file").write_bytes(os.urandom(MIB))
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
            events = [json.loads(line)["event"] for line in process.stderr]
            assert events == ["ending", "unmounted", "ended"]
        finally:
            process.kill()
            detach(tmp_path / "mnt")
    assert done("fsck", tmp_path / "v", "--data", "--json").document["verified_objects"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_unmounts_cleanly_even_with_files_open(mounted_volume: MountedVolume, number: signal.Signals) -> None:
    volume = mounted_volume
    file = open(volume.path / "open", "wb", buffering=0)  # noqa: SIM115 - closing it fails
    file.write(b"written and not closed")
    os.kill(volume.pid, number)
    wait_until_gone(volume.pid)
    assert not is_mount_point(volume.path)
    with pytest.raises(OSError, match="not connected"):
        file.close()
    volume.mount()
    assert (volume.path / "open").read_bytes() == b"written and not closed"


def test_the_daemon_ends_after_a_plain_umount(mounted_volume: MountedVolume) -> None:
    volume = mounted_volume
    (volume.path / "file").write_bytes(b"x" * MIB)
    subprocess.run(["umount", volume.path], check=True, timeout=30)
    wait_until_gone(volume.pid)
    assert sorted(path.name for path in Path(volume.address).glob("holder*")) == []
    volume.mount()
    assert (volume.path / "file").stat().st_size == MIB


def test_umount_cuts_off_open_files_by_force(mounted_volume: MountedVolume) -> None:
    volume = mounted_volume
    file = open(volume.path / "open", "wb", buffering=0)  # noqa: SIM115 - closing it is what fails
    file.write(b"data")
    volume.atoll("umount", "--force", str(volume.path))
    assert not is_mount_point(volume.path)
    with pytest.raises(OSError, match=r"not connected|[Cc]onnection abort"):
        file.write(b"more")
    with pytest.raises(OSError, match="not connected"):
        file.close()
    volume.mount()
    assert (volume.path / "open").read_bytes() == b"data"


def test_a_dead_mount_is_taken_away_by_the_next_mount_which_says_so(mounted_volume: MountedVolume) -> None:
    volume = mounted_volume
    (volume.path / "file").write_bytes(b"kept")
    volume.kill_daemon()
    assert "daemon is gone" in run("info", volume.path / "file").error()
    ran = done("mount", volume.address, volume.path, "--cache-dir", volume.cache_dir)
    assert ran.stderr == f"atoll: the daemon of the mount at {volume.path} was gone: unmounted it first\n"
    assert (volume.path / "file").read_bytes() == b"kept"
    volume.pid = volume.document("status", volume.address)["holder"]["pid"]


def test_a_dead_mount_is_taken_away_by_umount(mounted_volume: MountedVolume) -> None:
    volume = mounted_volume
    volume.kill_daemon()
    assert "was gone: unmounted it" in done("umount", volume.path).stderr
    assert not is_mount_point(volume.path)
    volume.mount()


def test_a_dead_mount_of_another_volume_is_left_to_its_owner(mounted_volume: MountedVolume, tmp_path: Path) -> None:
    volume = mounted_volume
    volume.kill_daemon()
    done("format", tmp_path / "other")
    line = run("mount", tmp_path / "other", volume.path, "--cache-dir", volume.cache_dir).error()
    assert "dead mount of" in line
    assert "atoll umount" in line
    assert is_mount_point(volume.path)
    volume.mount()


def test_a_stopped_daemon_is_named_and_blocks_no_command_for_long(
    mounted_volume: MountedVolume, tmp_path: Path
) -> None:
    volume = mounted_volume
    (tmp_path / "second").mkdir()
    os.kill(volume.pid, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(2) as at_once:
            umount = at_once.submit(run, "umount", volume.path)
            mount = at_once.submit(run, "mount", volume.address, tmp_path / "second", "--cache-dir", volume.cache_dir)
        assert f"pid {volume.pid}" in umount.result().error()
        assert f"{volume.path} by pid {volume.pid} and silent" in mount.result().error()
    finally:
        os.kill(volume.pid, signal.SIGCONT)


def test_a_mount_that_loses_its_volume_ends_and_the_next_one_goes_on(mounted_volume: MountedVolume) -> None:
    volume = mounted_volume
    (volume.path / "before").write_bytes(b"kept")
    with sqlite3.connect(Path(volume.address) / "meta.db") as database:
        database.execute("UPDATE volume SET owner_nonce = 'somebody else'")
    database.close()
    with pytest.raises(OSError, match=r"Stale|not connected|connection abort"):
        (volume.path / "after").touch()
    wait_until_gone(volume.pid)
    # Not unmounted: a program that goes on must not write into the directory below.
    with pytest.raises(OSError, match="not connected"):
        (volume.path / "after").touch()
    volume.mount()
    assert os.listdir(volume.path) == ["before"]
    log = Path(volume.document("status", volume.address)["holder"]["log_path"]).read_text()
    assert "the volume was lost" in log


def test_a_command_waits_for_a_mount_that_is_ending(mounted_volume: MountedVolume) -> None:
    volume = mounted_volume
    for number in range(20):
        (volume.path / f"file {number}").write_bytes(os.urandom(MIB))
    os.kill(volume.pid, signal.SIGTERM)
    # Between the signal and the end the holder refuses, or is gone, or still owns the volume: all are waited for.
    assert volume.document("fsck", volume.address)["clean"]
    wait_until_gone(volume.pid)
    volume.mount()


def test_a_mount_waits_for_the_mount_before_it(mounted_volume: MountedVolume) -> None:
    volume = mounted_volume
    (volume.path / "file").write_bytes(os.urandom(5 * MIB))
    before = volume.pid
    subprocess.run(["umount", "-l", volume.path], check=True, timeout=30)
    volume.mount()
    assert volume.pid != before
    assert (volume.path / "file").stat().st_size == 5 * MIB


def test_two_commands_at_once_wait_for_each_other(tmp_path: Path) -> None:
    done("format", tmp_path / "v")
    running = [
        subprocess.Popen([ATOLL, "fsck", tmp_path / "v"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    for process in running:
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, b"")


# -- the command line itself ------------------------------------------------------------------------------------------------


def test_every_command_has_help_and_its_summary_in_the_overview() -> None:
    overview = done("--help").stdout
    for name, summary in COMMANDS.items():
        assert summary in overview
        assert done(name, "--help").stdout.startswith(f"Usage: atoll {name}")
    assert re.fullmatch(r"atoll \d+\.\d+\.\d+\n", done("--version").stdout)


LIGHT = """
import sys
sys.argv = ["atoll", *sys.argv[1:]]
from client.cli.main import run
try:
    run()
except SystemExit:
    pass
print("\\n".join(sorted(sys.modules)), file=sys.stderr)
"""


def modules_after(*arguments: str) -> set[str]:
    ran = subprocess.run(
        [sys.executable, "-c", LIGHT, *arguments], capture_output=True, text=True, check=True, timeout=60
    )
    return {name.partition(".")[0] for name in ran.stderr.splitlines()}


def test_help_and_version_import_nothing_heavy(tmp_path: Path) -> None:
    heavy = {"rich", "obstore", "pyfuse3", "uvloop", "structlog", "grpc", "asyncio", "sqlite3", "blake3", "zstandard"}
    assert "click" in modules_after("--help")
    assert modules_after("--help") & heavy == set()
    assert modules_after("--version") & heavy == set()
    done("format", tmp_path / "v")
    assert modules_after("status", str(tmp_path / "v")) & {"rich", "pyfuse3", "uvloop", "structlog", "grpc"} == set()


def test_output_into_a_pipe_that_closes_is_no_traceback(tmp_path: Path) -> None:
    done("format", tmp_path / "v")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        ran = subprocess.run([ATOLL, "status", tmp_path / "v"], stdout=closed, stderr=subprocess.PIPE, timeout=60)
    assert (ran.returncode, ran.stderr) == (1, b"")
