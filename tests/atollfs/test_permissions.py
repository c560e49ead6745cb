"""Who may do what, as rules, and as another user meets them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from atollfs import AtollFileSystem
from atollfs.permissions import EXECUTE, READ, WRITE, Identity, umask
from metasvc.model import Ino, Inode
from tests.atollfs.places import Place


def inode(mode: int, *, uid: int = 1000, gid: int = 1000) -> Inode:
    return Inode(Ino(20), mode, 1, uid, gid, 0, 0, 0, 0, 0, Ino(1), 0, 0, 0)


OWNER = Identity(1000, 7)
MEMBER = Identity(7, 1000)
LATER_MEMBER = Identity(7, 7, frozenset({1000}))
OTHER = Identity(7, 7)
ROOT = Identity(0, 0)


@pytest.mark.parametrize(
    ("who", "mode", "wanted", "granted"),
    [
        (OWNER, 0o100600, READ | WRITE, True),
        (OWNER, 0o100077, READ, False),  # the first class that fits decides
        (MEMBER, 0o100640, READ, True),
        (MEMBER, 0o100640, READ | WRITE, False),
        (MEMBER, 0o100604, READ, False),
        (LATER_MEMBER, 0o100060, WRITE, True),
        (OTHER, 0o100604, READ, True),
        (OTHER, 0o040751, EXECUTE, True),
        (OTHER, 0o040750, EXECUTE, False),
        (ROOT, 0o100000, READ | WRITE, True),
    ],
)
def test_the_class_that_fits_first_decides(who: Identity, mode: int, wanted: int, granted: bool) -> None:  # noqa: FBT001
    assert who.may(inode(mode), wanted) is granted


def test_a_sticky_directory_lets_go_of_a_file_for_its_owner_the_file_s_and_root() -> None:
    sticky, file = inode(0o041777, uid=1), inode(0o100666, uid=2)
    assert [Identity(uid, 9).may_remove(sticky, file) for uid in (0, 1, 2, 3)] == [True, True, True, False]
    assert Identity(3, 9).may_remove(inode(0o040777, uid=1), file)


def test_the_umask_is_that_of_the_process() -> None:
    before = os.umask(0o027)
    try:
        assert umask() == 0o027
    finally:
        os.umask(before)


def test_files_belong_to_who_writes_them_and_follow_the_umask(fs: AtollFileSystem, here: str) -> None:
    before = os.umask(0o027)
    try:
        fs.pipe_file(f"{here}/d/file", b"x")
    finally:
        os.umask(before)
    found = fs.info(f"{here}/d/file")
    assert (found["mode"], found["uid"], found["gid"]) == (0o100640, os.geteuid(), os.getegid())
    assert fs.info(f"{here}/d")["mode"] == 0o040750


PROGRAM = """
import json, os, sys
from atollfs import AtollFileSystem
options = json.loads(sys.argv[1])
with AtollFileSystem(**options) as fs:
    fs.ls("/")
    # Only now: who it becomes may reach neither these sources nor the cache.
    os.setgroups([4000])
    os.setegid(3000)
    os.seteuid(3000)
    def what(call, *arguments, **more):
        try:
            call(*arguments, **more)
        except OSError as error:
            return type(error).__name__
        return "done"
    found = {
        "read": what(fs.cat_file, "/theirs/readable"),
        "secret": what(fs.cat_file, "/theirs/secret"),
        "group": what(fs.cat_file, "/theirs/group"),
        "write": what(fs.pipe_file, "/theirs/readable", b""),
        "new": what(fs.pipe_file, "/theirs/new", b""),
        "below": what(fs.info, "/closed/file"),
        "missing below": what(fs.info, "/closed/missing"),
        "list": what(fs.ls, "/closed"),
        "remove": what(fs.rm, "/theirs/readable"),
        "remove all": what(fs.rm, "/theirs", recursive=True),
        "rename": what(fs.mv, "/theirs/readable", "/open/readable"),
        "mkdir": what(fs.mkdir, "/theirs/d", create_parents=False),
        "own": what(fs.pipe_file, "/open/own", b"x"),
        "own again": what(fs.pipe_file, "/open/own", b"y"),
        "sticky": what(fs.rm, "/open/root's"),
        "over sticky": what(fs.mv, "/open/own", "/open/root's"),
        "own rename": what(fs.mv, "/open/own", "/open/mine"),
        "owner": fs.info("/open/mine")["uid"],
    }
    os.seteuid(0)
print(json.dumps(found))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_another_user_meets_what_a_kernel_would_say(service_volume: Place) -> None:
    from metasvc.model import SetAttr

    with service_volume.opened() as fs:
        for name in ("readable", "secret", "group"):
            fs.pipe_file(f"/theirs/{name}", name.encode())
        fs.pipe_file("/closed/file", b"x")
        fs.pipe_file("/open/root's", b"x")

        async def chmod(tree: object, path: bytes, mode: int, gid: int = 0) -> None:
            found = await tree.stat(path)  # type: ignore[attr-defined]
            vfs = tree.vfs  # type: ignore[attr-defined]
            await vfs.setattr(vfs.caller(0, 0), found.ino, SetAttr(mode=mode, gid=gid))

        from atollfs import volumes

        for path, mode, gid in [
            ("/theirs", 0o755, 0),
            ("/theirs/readable", 0o644, 0),
            ("/theirs/secret", 0o600, 0),
            ("/theirs/group", 0o640, 4000),
            ("/closed", 0o700, 0),
            ("/open", 0o1777, 0),
        ]:
            volumes.run_at_home(lambda p=path, m=mode, g=gid: fs._ask(p, chmod, p.encode(), m, g))  # type: ignore[misc]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(service_volume.options)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "read": "done",
        "secret": "PermissionError",
        "group": "done",
        "write": "PermissionError",
        "new": "PermissionError",
        "below": "PermissionError",
        "missing below": "PermissionError",
        "list": "PermissionError",
        "remove": "PermissionError",
        "remove all": "PermissionError",
        "rename": "PermissionError",
        "mkdir": "PermissionError",
        "own": "done",
        "own again": "done",
        "sticky": "PermissionError",
        "over sticky": "PermissionError",
        "own rename": "done",
        "owner": 3000,
    }
