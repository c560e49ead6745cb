"""`atoll dump` and `atoll load` at the command line: what they print, refuse and leave."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.client.cli.commands import DEADLINE_S, done, picture, run
from tests.mount.mounted import ATOLL, MountedVolume


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    done("format", tmp_path / "vol")
    return tmp_path / "vol"


def test_a_volume_that_nobody_holds_is_dumped_and_loaded(volume: Path, tmp_path: Path) -> None:
    file, copy = tmp_path / "dump", tmp_path / "copy"
    said = done("dump", volume, file).stdout
    assert said.startswith(f"{file}: ")
    assert "rows/s, as of batch" in said
    loaded = done("load", file, copy).stdout.splitlines()
    uuid = done("status", volume, "--json").document["format"]["uuid"]
    assert loaded[0].startswith(f"{copy}: volume {uuid} as of ")
    assert f"atoll fsck {copy}" in loaded[1]
    assert loaded[2] == f"its objects go into {copy}/objects: move them there before it is used"
    one, two = (done("status", place, "--json").document for place in (volume, copy))
    assert one["format"] == two["format"]
    assert one["usage"] == two["usage"]


def test_stdin_and_stdout_will_do(volume: Path, tmp_path: Path) -> None:
    dumped = subprocess.run([ATOLL, "dump", volume, "-"], capture_output=True, timeout=DEADLINE_S, check=True)
    assert dumped.stdout.startswith(b"ATLD\x01\0")
    assert dumped.stderr.startswith(b"atoll: ")
    subprocess.run(
        [ATOLL, "load", "-", tmp_path / "copy"],
        input=dumped.stdout,
        capture_output=True,
        timeout=DEADLINE_S,
        check=True,
    )
    done("fsck", tmp_path / "copy")


def test_documents(volume: Path, tmp_path: Path) -> None:
    file, copy = tmp_path / "dump", tmp_path / "copy"
    document = done("dump", volume, file, "--json").document
    assert set(document) == {"file", "uuid", "volume", "last_batch", "rows", "inodes", "size_bytes", "seconds"}
    assert (document["volume"], document["inodes"], document["size_bytes"]) == ("local/default", 1, file.stat().st_size)
    loaded = done("load", file, copy, "--json").document
    assert set(loaded) == {"address", "backup", "file", "format", "dumped_ns", "rows", "seconds"}
    assert (loaded["address"], loaded["rows"]) == (str(copy), document["rows"])


def test_the_holder_makes_the_same_dump_as_the_command(mounted_volume: MountedVolume, tmp_path: Path) -> None:
    (mounted_volume.path / "d").mkdir()
    held = mounted_volume.document("dump", str(mounted_volume.path), str(tmp_path / "held"))
    mounted_volume.unmount()
    free = mounted_volume.document("dump", mounted_volume.address, str(tmp_path / "free"))
    assert held["inodes"] == free["inodes"] == 2
    assert held["uuid"] == free["uuid"]
    assert held["last_batch"] < free["last_batch"], "the end of the mount's session lies between them"


@pytest.mark.parametrize("what", ["empty", "text", "cut", "changed", "newer"])
def test_what_is_no_dump_makes_no_volume(volume: Path, tmp_path: Path, what: str) -> None:
    file = tmp_path / "dump"
    done("dump", volume, file)
    data = bytearray(file.read_bytes())
    match what:
        case "empty":
            data, says = bytearray(), "was cut off, its end is missing: take another dump"
        case "text":
            data, says = bytearray(b"{}" * 100), "this is no dump of AtollFS: give a file that `atoll dump` wrote"
        case "cut":
            del data[-1]
            says = "was cut off, its end is missing: take another dump"
        case "changed":
            data[-1] ^= 1
            says = "is not what was written: take another dump"
        case _:
            data[4] = 9
            says = "the dump has version 9, this AtollFS knows up to 1: upgrade AtollFS"
    file.write_bytes(data)
    before = picture(tmp_path)
    assert says in run("load", file, tmp_path / "copy").error()
    assert picture(tmp_path) == before


def test_what_is_there_is_not_touched(volume: Path, tmp_path: Path) -> None:
    file = tmp_path / "dump"
    done("dump", volume, file)
    before = picture(tmp_path)
    assert "there is a volume at" in run("load", file, volume).error()
    assert "is not empty" in run("load", file, tmp_path).error()
    assert "is a file" in run("load", file, file).error()
    assert "check the path" in run("load", tmp_path / "absent", tmp_path / "copy").error()
    assert "is a directory" in run("dump", volume, tmp_path).error(2)
    assert "give another place" in run("dump", volume, tmp_path / "absent" / "dump").error()
    assert "no volume" in run("dump", tmp_path / "absent", tmp_path / "other").error()
    assert "prints on stdout" in run("dump", volume, "-", "--json").error(2)
    assert "names a path in a volume" in run("load", file, f"{tmp_path}/copy:/sub").error(2)
    assert "say with --bucket" in run("load", file, "atoll://127.0.0.1:1/a/b").error(2)
    run("load", file, tmp_path / "copy", "--bucket", f"file://{tmp_path}/absent").error()
    assert picture(tmp_path) == before


def test_what_a_killed_load_left_is_removed_and_nothing_of_others(volume: Path, tmp_path: Path) -> None:
    file, draft = tmp_path / "dump", tmp_path / "copy.loading"
    done("dump", volume, file)
    (draft / "objects").mkdir(parents=True)
    (draft / "meta.db").write_bytes(b"half")
    (draft / "link").symlink_to(volume)
    done("load", file, tmp_path / "copy")
    assert not draft.exists()
    assert (volume / "meta.db").exists()
    done("fsck", tmp_path / "copy")
    # A link in the place of the draft is somebody's trick.
    (tmp_path / "second.loading").symlink_to(volume)
    before = picture(volume)
    run("load", file, tmp_path / "second").error()
    assert picture(volume) == before


def test_a_dump_replaces_an_older_one(volume: Path, tmp_path: Path) -> None:
    file = tmp_path / "dump"
    file.write_bytes(b"older")
    done("dump", volume, file)
    assert file.read_bytes().startswith(b"ATLD")
    assert sorted(os.listdir(tmp_path)) == ["dump", "vol"]


def test_a_load_that_is_interrupted_leaves_nothing_though_its_pipe_says_nothing(volume: Path, tmp_path: Path) -> None:
    file, draft = tmp_path / "dump", tmp_path / "copy.loading"
    done("dump", volume, file)
    before = picture(tmp_path)
    with subprocess.Popen(
        [ATOLL, "load", "-", tmp_path / "copy"], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as load:
        assert load.stdin is not None
        load.stdin.write(file.read_bytes()[:-10])
        load.stdin.flush()
        deadline = time.monotonic() + DEADLINE_S
        while not (draft / "meta.db").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        load.send_signal(signal.SIGINT)
        assert load.wait(DEADLINE_S) == 130
    assert picture(tmp_path) == before
