"""What each operation does, on an embedded volume and on a service's."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import pickle
import signal
import threading
import time
from datetime import UTC
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pytest
from fsspec.callbacks import Callback  # type: ignore[import-untyped]

from atollfs import AtollFileSystem
from atollfs.tree import Descriptor
from chunkstore.geometry import MIB
from metasvc.errors import FsError
from tests.atollfs.places import Place


def test_a_file_is_what_was_written_and_info_tells_of_it(fs: AtollFileSystem, here: str) -> None:
    path = f"{here}/file"
    before = time.time()
    fs.pipe_file(path, b"content")
    found = fs.info(path)
    assert (found["name"], found["size"], found["type"], found["islink"]) == (path, 7, "file", False)
    assert before - 1 < found["mtime"] < time.time() + 1
    assert abs(fs.modified(path).timestamp() - found["mtime"]) < 1e-5
    assert fs.modified(path).tzinfo is UTC
    assert fs.created(path) >= fs.modified(path)
    assert fs.ls(here, detail=False) == [path]
    assert fs.ls(path, detail=False) == [path]
    assert fs.exists(path)
    assert fs.isfile(path)
    assert not fs.isdir(path)
    assert fs.info(here)["type"] == "directory"
    assert fs.size(path) == 7
    assert fs.du(here) == 7
    assert fs.info("/")["type"] == "directory"


@pytest.mark.parametrize("size", [0, 1, 40_000, 9 * MIB + 3])
def test_ranges_are_those_of_a_slice(fs: AtollFileSystem, here: str, size: int) -> None:
    content = os.urandom(size)
    path = f"{here}/file"
    fs.pipe_file(path, content)
    assert fs.cat_file(path) == content
    for start, end in [(0, 10), (5, None), (-10, None), (-10, -3), (None, 100), (3, 3), (10, 2), (size, size + 9)]:
        assert fs.cat_file(path, start=start, end=end) == content[start:end]
    assert fs.cat_ranges([path, path], [0, 7], [5, None]) == [content[:5], content[7:]]
    assert fs.head(path, 9) == content[:9]
    assert fs.tail(path, 9) == content[-9:] if size else fs.tail(path, 9) == b""


def test_missing_things_and_wrong_kinds_are_the_errors_that_python_has_for_them(fs: AtollFileSystem, here: str) -> None:
    fs.pipe_file(f"{here}/file", b"x")
    fs.mkdir(f"{here}/d")
    for call in (fs.info, fs.cat_file, fs.rm_file, fs.ls, fs.rmdir):
        with pytest.raises(FileNotFoundError) as missing:
            call(f"{here}/missing")
        assert missing.value.filename == f"{here}/missing"
    with pytest.raises(FileNotFoundError):
        fs.open(f"{here}/missing")
    with pytest.raises(FileNotFoundError):
        fs.mv(f"{here}/missing", f"{here}/other")
    with pytest.raises(FileNotFoundError):
        fs.cp_file(f"{here}/missing", f"{here}/other")
    assert not fs.exists(f"{here}/other")
    with pytest.raises(NotADirectoryError):
        fs.info(f"{here}/file/below")
    assert not fs.exists(f"{here}/file/below")
    for read in (fs.cat_file, fs.open, fs.rm_file):
        with pytest.raises(IsADirectoryError):
            read(f"{here}/d")
    with pytest.raises(IsADirectoryError):
        fs.pipe_file(f"{here}/d", b"")
    with pytest.raises(FileExistsError):
        fs.mkdir(f"{here}/d")
    with pytest.raises(FileExistsError):
        fs.makedirs(f"{here}/d")
    with pytest.raises(FileExistsError):
        fs.makedirs(f"{here}/file", exist_ok=True)
    fs.makedirs(f"{here}/d", exist_ok=True)
    with pytest.raises(NotADirectoryError):
        fs.rmdir(f"{here}/file")
    fs.touch(f"{here}/d/inner")
    with pytest.raises(OSError, match="not empty") as refused:
        fs.rmdir(f"{here}/d")
    assert refused.value.errno == errno.ENOTEMPTY
    with pytest.raises(OSError, match="too long") as refused:
        fs.touch(f"{here}/{'n' * 256}")
    assert refused.value.errno == errno.ENAMETOOLONG


def test_directories_above_a_new_file_are_made_unless_that_is_refused(place: Place, here: str) -> None:
    with place.opened() as fs:
        fs.pipe_file(f"{here}/a/b/c", b"x")
        fs.cp_file(f"{here}/a/b/c", f"{here}/e/f")
        fs.mv(f"{here}/e/f", f"{here}/g/h")
        assert fs.find(here) == [f"{here}/a/b/c", f"{here}/g/h"]


def test_writing_goes_on_where_files_are_appended_to(fs: AtollFileSystem, here: str) -> None:
    path = f"{here}/log"
    for number in range(3):
        with fs.open(path, "ab") as file:
            assert file.tell() == number
            file.write(b"%d" % number)
    assert fs.cat_file(path) == b"012"
    with fs.open(path, "a") as text:
        text.write("drei\n")
    with fs.open(path, "r") as text:
        assert text.readlines() == ["012drei\n"]


def test_a_file_can_be_read_and_changed_in_place(fs: AtollFileSystem, here: str) -> None:
    path = f"{here}/file"
    with fs.open(path, "w+b") as file:
        file.write(b"0123456789" * 100_000)
        file.seek(500_000)
        file.write(b"changed")
        file.seek(499_998)
        assert file.read(11) == b"89changed78"
        file.truncate(700_000)
        assert file.seek(0, os.SEEK_END) == 700_000
    assert fs.size(path) == 700_000
    with fs.open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"end")
    assert fs.cat_file(path, start=-4) == b"8end"
    assert fs.size(path) == 700_002


def test_file_objects_behave_as_those_of_python(fs: AtollFileSystem, here: str) -> None:
    path = f"{here}/file"
    lines = b"".join(b"line %d\n" % number for number in range(100_000))
    with fs.open(path, "wb", block_size=1000) as file:
        file.writelines(lines.splitlines(keepends=True))
        assert not file.readable()
        with pytest.raises(io.UnsupportedOperation):
            file.read()
    assert file.closed
    with pytest.raises(ValueError, match="closed"):
        file.write(b"x")
    with fs.open(path) as file:
        assert file.readline() == b"line 0\n"
        assert (file.size, file.mode, file.path, file.info()["size"]) == (len(lines), "rb", path, len(lines))
        assert file.full_name == fs.unstrip_protocol(path)
        assert list(file) == lines.splitlines(keepends=True)[1:]
        file.seek(3)
        buffer = bytearray(2 * MIB)
        assert file.readinto(buffer) == len(lines) - 3
        assert buffer[: len(lines) - 3] == lines[3:]
        with pytest.raises(OSError, match=r"seek|Invalid"):
            file.seek(-1)
        with pytest.raises(io.UnsupportedOperation):
            file.write(b"x")
    for mode in ("rw", "q", "", "rr"):
        with pytest.raises(ValueError, match="mode"):
            fs._open(path, mode)
    with fsspec.open(fs.unstrip_protocol(path), "wb", compression="gzip", **_options(fs)) as file:
        file.write(lines)
    assert fs.size(path) < len(lines)
    with fsspec.open(fs.unstrip_protocol(path), "rb", compression="gzip", **_options(fs)) as file:
        assert file.read() == lines


def _options(fs: AtollFileSystem) -> dict[str, Any]:
    return {key: value for key, value in fs.storage_options.items() if key != "skip_instance_cache"}


def test_times_and_keys_tell_of_changes(fs: AtollFileSystem, here: str) -> None:
    path = f"{here}/file"
    fs.pipe_file(path, b"one")
    first, key, checksum = fs.info(path), fs.ukey(path), fs.checksum(path)
    assert fs.ukey(path) == key
    fs.touch(path, truncate=False)
    assert fs.cat_file(path) == b"one"
    assert fs.info(path)["mtime_ns"] > first["mtime_ns"]
    fs.pipe_file(path, b"two")
    assert fs.ukey(path) != key
    assert fs.checksum(path) != checksum
    fs.touch(path)
    assert fs.size(path) == 0


def test_a_copy_shares_what_the_original_holds(fs: AtollFileSystem, place: Place, here: str) -> None:
    content = os.urandom(5 * MIB)
    fs.pipe_file(f"{here}/original", content)
    fs.pipe_file(f"{here}/target", b"something longer was here" * MIB)
    before = set(place.objects())
    fs.cp_file(f"{here}/original", f"{here}/copy")
    fs.cp_file(f"{here}/original", f"{here}/target")
    assert set(place.objects()) <= before
    fs.pipe_file(f"{here}/original", b"changed")
    assert fs.cat_file(f"{here}/copy") == content
    assert fs.cat_file(f"{here}/target") == content
    with pytest.raises(OSError, match="onto itself"):
        fs.cp_file(f"{here}/copy", f"{here}/copy")
    assert fs.cat_file(f"{here}/copy") == content


def test_a_rename_is_one_step_and_keeps_the_inode(fs: AtollFileSystem, here: str) -> None:
    fs.pipe_file(f"{here}/d/one", b"1")
    fs.pipe_file(f"{here}/two", b"2")
    ino = fs.info(f"{here}/d/one")["ino"]
    fs.mv(f"{here}/d/one", f"{here}/two")
    assert (fs.info(f"{here}/two")["ino"], fs.cat_file(f"{here}/two")) == (ino, b"1")
    ino = fs.info(f"{here}/d")["ino"]
    fs.mv(f"{here}/d", f"{here}/e")
    assert fs.info(f"{here}/e")["ino"] == ino
    fs.mv(f"{here}/two", f"{here}/e")
    assert fs.find(here) == [f"{here}/e/two"]
    with pytest.raises(OSError, match="Invalid"):
        fs.mv(f"{here}/e", f"{here}/e/f")
    fs.pipe({f"{here}/e/{name}": b"" for name in "abc"})
    fs.mv(f"{here}/e/[ab]", f"{here}/f/")
    assert fs.ls(f"{here}/f", detail=False) == [f"{here}/f/a", f"{here}/f/b"]
    assert fs.ls(f"{here}/e", detail=False) == [f"{here}/e/c", f"{here}/e/two"]


def test_trees_are_walked_found_and_removed(fs: AtollFileSystem, here: str) -> None:
    names = [f"{here}/{top}/{middle}/{leaf}" for top in "ab" for middle in "cde" for leaf in range(50)]
    fs.pipe(dict.fromkeys(names, b""))
    assert fs.find(here) == sorted(names)
    assert fs.glob(f"{here}/*/c/1*") == sorted(name for name in names if "/c/1" in name)
    assert [path for path, _, files in fs.walk(here) if files] == [f"{here}/{t}/{m}" for t in "ab" for m in "cde"]
    with pytest.raises(IsADirectoryError):
        fs.rm(f"{here}/a")
    fs.rm(f"{here}/a", recursive=True)
    fs.rm([f"{here}/b/c/1", f"{here}/b/d"], recursive=True)
    assert fs.find(here) == sorted(
        name for name in names if "/b/e" in name or ("/b/c" in name and not name.endswith("/1"))
    )
    fs.rm(f"{here}/b", recursive=True, maxdepth=1)
    assert fs.isdir(f"{here}/b/c")
    with pytest.raises(FileNotFoundError):
        fs.rm(f"{here}/a", recursive=True)


def test_2500_names_are_listed_and_removed(fs: AtollFileSystem, here: str) -> None:
    fs.pipe({f"{here}/d/{number:05}": b"" for number in range(2500)})
    assert [entry["name"] for entry in fs.ls(f"{here}/d")] == [f"{here}/d/{number:05}" for number in range(2500)]
    fs.rm(f"{here}/d", recursive=True)
    assert not fs.exists(f"{here}/d")


def test_links_are_followed_in_the_volume_and_removed_as_links(fs: AtollFileSystem, here: str) -> None:
    fs.pipe_file(f"{here}/d/file", b"content")

    async def link(tree: Any, name: str, target: bytes) -> None:
        directory = await tree.stat(here.encode())
        await tree.vfs.symlink(tree.vfs.caller(0, 0), directory.ino, name.encode(), target)

    def make(name: str, target: bytes) -> None:
        from atollfs import volumes

        volumes.run_at_home(lambda: fs._ask(name, link, name, target))

    make("to-file", b"d/file")
    make("to-directory", b"./d")
    make("up", b"../" + here[1:].encode() + b"/d/file")
    make("loop", b"loop")
    make("dangling", b"nowhere")
    make("out", b"/etc/passwd")
    for name in ("to-file", "to-directory/file", "up"):
        assert fs.cat_file(f"{here}/{name}") == b"content"
    assert fs.info(f"{here}/to-file")["islink"]
    assert fs.isdir(f"{here}/to-directory")
    assert {entry["name"].rpartition("/")[2]: entry["type"] for entry in fs.ls(here)} == {
        "d": "directory",
        "dangling": "link",
        "loop": "link",
        "out": "link",
        "to-directory": "link",
        "to-file": "file",
        "up": "file",
    }
    assert not fs.exists(f"{here}/dangling")
    assert fs.info(f"{here}/dangling")["type"] == fs.info(f"{here}/loop")["type"] == "link"
    assert fs.du(here) == 3 * len(b"content") + sum(len(target) for target in (b"loop", b"nowhere", b"/etc/passwd"))
    with pytest.raises(OSError, match="symbolic links") as refused:
        fs.cat_file(f"{here}/loop")
    assert refused.value.errno == errno.ELOOP
    with pytest.raises(FileNotFoundError, match="leads out of the volume"):
        fs.cat_file(f"{here}/out")
    with fs.open(f"{here}/to-file", "ab") as file:
        file.write(b", and more")
    assert fs.cat_file(f"{here}/d/file") == b"content, and more"
    with fs.open(f"{here}/to-file", "a+b") as file:
        file.seek(0)
        assert file.read() == b"content, and more"
    fs.pipe_file(f"{here}/other", b"other")
    fs.cp_file(f"{here}/other", f"{here}/to-file")
    assert fs.cat_file(f"{here}/d/file") == b"other"
    with pytest.raises(FileNotFoundError):
        fs.open(f"{here}/dangling", "ab")
    with pytest.raises(IsADirectoryError):
        fs.open(f"{here}/to-directory", "ab")
    fs.pipe_file(f"{here}/to-file", b"through the link")
    assert fs.cat_file(f"{here}/d/file") == b"through the link"
    assert fs.info(f"{here}/to-file")["islink"], "it was not replaced by what went through it"
    fs.rm_file(f"{here}/to-file")
    fs.rm(f"{here}/to-directory", recursive=True)
    assert fs.cat_file(f"{here}/d/file") == b"through the link"


def test_files_go_to_the_local_disk_and_back_in_pieces_that_a_callback_sees(
    fs: AtollFileSystem, here: str, tmp_path: Path
) -> None:
    content = os.urandom(9 * MIB)
    (tmp_path / "local").write_bytes(content)
    seen = Callback()
    fs.put_file(str(tmp_path / "local"), f"{here}/file", callback=seen)
    assert (seen.size, seen.value) == (len(content), len(content))
    with pytest.raises(FileExistsError):
        fs.put_file(str(tmp_path / "local"), f"{here}/file", mode="create")
    seen = Callback()
    fs.get_file(f"{here}/file", str(tmp_path / "back"), callback=seen)
    assert (seen.size, seen.value) == (len(content), len(content))
    assert (tmp_path / "back").read_bytes() == content


def test_names_need_not_be_text(fs: AtollFileSystem, here: str) -> None:
    name = f"{here}/{os.fsdecode(bytes([0xFF, 0xC3]))} ü\n"
    fs.pipe_file(name, b"x")
    assert fs.ls(here, detail=False) == [name]
    assert fs.cat_file(name) == b"x"


def test_a_transaction_shows_whole_files_or_none(fs: AtollFileSystem, here: str) -> None:
    fs.pipe_file(f"{here}/one", b"before")
    with fs.transaction:
        with fs.open(f"{here}/one", "wb") as file:
            file.write(b"after")
        assert fs.cat_file(f"{here}/one") == b"before"
    assert fs.cat_file(f"{here}/one") == b"after"
    with pytest.raises(KeyError), fs.transaction:
        with fs.open(f"{here}/one", "wb") as file:
            file.write(b"never")
        raise KeyError
    assert fs.cat_file(f"{here}/one") == b"after"
    assert fs.ls(here, detail=False) == [f"{here}/one"]


@pytest.mark.parametrize("name", ["x" * 255, "語" * 85, "é" * 127, os.fsdecode(b"\xff" * 255)])
def test_a_name_may_be_as_long_in_a_transaction_as_elsewhere(fs: AtollFileSystem, here: str, name: str) -> None:
    assert len(os.fsencode(name)) <= 255
    with fs.transaction, fs.open(f"{here}/{name}", "wb") as file:
        file.write(b"content")
    assert fs.ls(here, detail=False) == [f"{here}/{name}"]
    assert fs.cat_file(f"{here}/{name}") == b"content"


@pytest.mark.parametrize("outcome", ["written", "under way", "failed", "never begun"])
@pytest.mark.parametrize("mode", ["ab", "a+b"])
def test_an_append_that_was_interrupted_is_in_the_file_once(
    fs: AtollFileSystem, here: str, mode: str, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"{here}/log"
    fs.pipe_file(path, b"before,")
    write = Descriptor.write
    over = threading.Event()

    async def slow(self: Descriptor, offset: int | None, data: bytes) -> None:
        await asyncio.sleep(0.5)
        if outcome == "failed":
            raise FsError(errno.EIO)
        await write(self, offset, data)
        over.set()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with fs.open(path, mode) as file:
        file.write(b"record,")
        with monkeypatch.context() as patched:
            if outcome == "never begun":
                patched.setattr("atollfs.file.run_at_home", interrupt)
            patched.setattr(Descriptor, "write", slow)
            handler = signal.signal(signal.SIGALRM, interrupt)
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                with pytest.raises(KeyboardInterrupt):
                    file.flush()
                    time.sleep(10)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, handler)
        assert outcome != "written" or over.wait(30)
        file.write(b"another,")
        file.flush()
        file.write(b"another,")
        file.flush()
        file.write(b"another,")
    assert fs.cat_file(path) == b"before,record,another,another,another,"


def test_a_file_system_and_an_open_file_pickle_as_what_they_are(place: Place, here: str) -> None:
    fs = AtollFileSystem(**place.options)
    with fs:
        fs.pipe_file(f"{here}/file", b"0123456789")
        other = pickle.loads(pickle.dumps(fs))
        assert other == fs
        assert other.cat_file(f"{here}/file") == b"0123456789"
        with fs.open(f"{here}/file") as file:
            file.read(4)
            again = pickle.loads(pickle.dumps(file))
            assert again.read() == b"456789"
            again.close()
        assert AtollFileSystem.from_json(fs.to_json()) == fs


def test_coroutines_of_any_loop_and_plain_calls_work_on_one_volume(place: Place, here: str) -> None:
    with place.opened(asynchronous=True) as fs:

        async def work(number: int) -> bytes:
            path = f"{here}/{number}"
            await fs._pipe_file(path, b"%d" % number)
            async with await fs.open_async(path, "r+b") as file:
                assert await file.read(1) == b"%d" % number
                await file.write(b" more")
                await file.flush()
                assert file.tell() == 6
                await file.seek(-4, os.SEEK_END)
                assert await file.read() == b"more"
            assert file.closed
            with pytest.raises(ValueError, match="closed"):
                await file.read()
            with pytest.raises(FileNotFoundError):
                await fs._info(f"{here}/missing")
            return bytes(await fs._cat_file(path))

        async def all_work() -> list[bytes]:
            found = await asyncio.gather(*(work(number) for number in range(10)))
            assert sorted(await fs._find(here)) == [f"{here}/{number}" for number in range(10)]
            return found

        # Each asyncio.run is a loop of its own: one volume serves both.
        for _ in range(2):
            assert asyncio.run(all_work()) == [b"%d more" % number for number in range(10)]
        with fs.open(f"{here}/3") as file:
            assert file.read() == b"3 more"


def test_a_cancelled_coroutine_leaves_the_file_system_whole(fs: AtollFileSystem, here: str) -> None:
    content = os.urandom(30 * MIB)

    async def cancelled() -> None:
        writing = asyncio.create_task(fs._pipe_file(f"{here}/file", content))
        await asyncio.sleep(0.01)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing

    asyncio.run(cancelled())
    fs.pipe_file(f"{here}/file", b"after")
    assert fs.cat_file(f"{here}/file") == b"after"


def test_a_read_only_file_system_changes_nothing(service_volume: Place) -> None:
    with service_volume.opened(read_only=True) as fs:
        assert isinstance(fs.ls("/"), list)
        with pytest.raises(OSError, match="Read-only") as refused:
            fs.pipe_file("/read-only", b"x")
        assert refused.value.errno == errno.EROFS


def test_file_systems_that_stand_on_others_work_on_this_one(fs: AtollFileSystem, here: str, tmp_path: Path) -> None:
    fs.pipe_file(f"{here}/d/file", b"content")
    below = fsspec.filesystem("dir", path=here, fs=fs)
    assert below.find("/") == ["d/file"]
    assert below.cat_file("d/file") == b"content"
    with below.open("d/new", "wb") as file:
        file.write(b"new")
    options = _options(fs)
    if "token" in options:
        del options["address"]  # the URL has it
    cached = fsspec.filesystem(
        "filecache", target_protocol="atoll", target_options=_options(fs), cache_storage=str(tmp_path / "copies")
    )
    assert cached.cat_file(f"{here}/d/new") == b"new"
    with fsspec.open(f"simplecache::{fs.unstrip_protocol(here)}/d/new", "rb", atoll=options) as file:
        assert file.read() == b"new"
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/from-memory", b"m" * 100_000)
    generic = fsspec.filesystem("generic", default_method="current")
    generic.cp("memory:///from-memory", f"{fs.unstrip_protocol(here)}/from-memory")
    assert fs.size(f"{here}/from-memory") == 100_000
    memory.rm("/from-memory")
    mapper = fs.get_mapper(f"{here}/map")
    mapper["a/b"] = b"value"
    assert (list(mapper), mapper["a/b"]) == (["a/b"], b"value")
