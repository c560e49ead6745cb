"""Single rules of POSIX and of AtollFS, one test each, on the engine over every store."""

from __future__ import annotations

import errno as E
import stat

import pytest

from metasvc.engine import acl
from metasvc.engine.tx import Tx
from metasvc.errors import FsError, OutOfSpace
from metasvc.model import IN_TRASH, ROOT_INO, Caller, Commit, Counter, Ino, RenameFlags, SetAttr
from metasvc.store.tables import COUNTER, DENTRY, INODE
from tests.metasvc.engine.volumes import ROOT, Opened, format_volume, new_store, opened

USER = Caller(uid=1000, gid=1000, umask=0o022)
DAY_NS = 24 * 3600 * 10**9


def refused(errno: int) -> pytest.RaisesExc[FsError]:
    """Expect a refusal with this errno."""
    return pytest.RaisesExc(FsError, check=lambda exc: exc.errno == errno)


async def mkdir(volume: Opened, name: bytes, *, parent: Ino = ROOT_INO, mode: int = 0o755) -> Ino:
    return (await volume.meta.mkdir(ROOT, parent, name, mode=mode)).ino


async def touch(volume: Opened, name: bytes, *, parent: Ino = ROOT_INO, content: bytes = b"") -> Ino:
    made = await volume.meta.create(USER, parent, name, mode=0o666, exclusive=True)
    if content:
        await volume.write(made.inode.ino, 0, content)
    await volume.meta.release(made.inode.ino)
    return made.inode.ino


@pytest.mark.parametrize(
    ("name", "errno"),
    [(b"x" * 256, E.ENAMETOOLONG), (b"", E.ENOENT), (b"a/b", E.EINVAL), (b"a\0b", E.EINVAL), (b".", E.EEXIST)],
)
async def test_names_that_cannot_be_are_refused(name: bytes, errno: int) -> None:
    async with opened(await format_volume(await new_store())) as volume:
        with pytest.raises(FsError) as refusal:
            await volume.meta.mkdir(ROOT, ROOT_INO, name, mode=0o755)
        assert refusal.value.errno == errno


async def test_create_opens_what_is_there_only_if_it_is_a_regular_file() -> None:
    async with opened(await format_volume(await new_store())) as volume:
        meta = volume.meta
        file = await touch(volume, b"file")
        link = (await meta.symlink(ROOT, ROOT_INO, b"link", b"file")).ino
        await mkdir(volume, b"d")
        await meta.mknod(ROOT, ROOT_INO, b"fifo", mode=stat.S_IFIFO | 0o644)
        for name, errno in [(b"link", E.EINVAL), (b"fifo", E.EINVAL), (b"d", E.EISDIR)]:
            with refused(errno):
                await meta.create(ROOT, ROOT_INO, name, mode=0o644, exclusive=False)
            with refused(E.EEXIST):
                await meta.create(ROOT, ROOT_INO, name, mode=0o644, exclusive=True)
        assert not volume.engine.sessions_holding(link)
        assert (await meta.create(ROOT, ROOT_INO, b"file", mode=0o644, exclusive=False)).inode.ino == file
        await meta.release(file)


async def test_umask_setgid_and_owner_of_a_new_inode() -> None:
    async with opened(await format_volume(await new_store())) as volume:
        meta = volume.meta
        shared = await mkdir(volume, b"shared")
        await meta.setattr(ROOT, shared, SetAttr(mode=0o2775, gid=77))
        file = await meta.mknod(USER, shared, b"f", mode=stat.S_IFREG | 0o666)
        below = await meta.mkdir(USER, shared, b"d", mode=0o777)
        assert (file.uid, file.gid, file.mode) == (1000, 77, stat.S_IFREG | 0o644)
        assert (below.gid, below.mode) == (77, stat.S_IFDIR | 0o2755)


async def test_default_acl_is_inherited_in_place_of_the_umask() -> None:
    entries = [
        acl.AclEntry(acl.USER_OBJ, 7, 0xFFFFFFFF),
        acl.AclEntry(acl.USER, 6, 1234),
        acl.AclEntry(acl.GROUP_OBJ, 5, 0xFFFFFFFF),
        acl.AclEntry(acl.MASK, 7, 0xFFFFFFFF),
        acl.AclEntry(acl.OTHER, 0, 0xFFFFFFFF),
    ]
    async with opened(await format_volume(await new_store())) as volume:
        meta = volume.meta
        top = await mkdir(volume, b"d")
        await meta.setxattr(ROOT, top, acl.DEFAULT, acl.pack(entries), flags=0)
        file = await meta.mknod(USER, top, b"f", mode=stat.S_IFREG | 0o664)
        below = await meta.mkdir(USER, top, b"below", mode=0o777)
        access = acl.parse(await meta.getxattr(file.ino, acl.ACCESS))
        assert stat.S_IMODE(file.mode) == 0o660
        assert {entry.tag: entry.perm for entry in access}[acl.MASK] == 6
        assert acl.parse(await meta.getxattr(below.ino, acl.DEFAULT)) == entries
        changed = await meta.setattr(ROOT, file.ino, SetAttr(mode=0o600))
        access = acl.parse(await meta.getxattr(file.ino, acl.ACCESS))
        assert {entry.tag: entry.perm for entry in access}[acl.MASK] == 0
        assert stat.S_IMODE(changed.mode) == 0o600


async def test_an_acl_that_says_no_more_than_the_mode_is_kept_as_mode() -> None:
    entries = [acl.AclEntry(tag, 4, 0xFFFFFFFF) for tag in (acl.USER_OBJ, acl.GROUP_OBJ, acl.OTHER)]
    async with opened(await format_volume(await new_store())) as volume:
        ino = await touch(volume, b"f")
        await volume.meta.setxattr(ROOT, ino, acl.ACCESS, acl.pack(entries), flags=0)
        assert stat.S_IMODE((await volume.meta.getattr(ino)).mode) == 0o444
        assert await volume.meta.listxattr(ino) == []


async def test_xattr_flags_limits_and_namespaces() -> None:
    async with opened(await format_volume(await new_store())) as volume:
        meta = volume.meta
        ino = await touch(volume, b"f")
        await meta.setxattr(ROOT, ino, b"user.a", b"1", flags=1)
        with refused(E.EEXIST):
            await meta.setxattr(ROOT, ino, b"user.a", b"2", flags=1)
        with refused(E.ENODATA):
            await meta.setxattr(ROOT, ino, b"user.b", b"2", flags=2)
        with refused(E.EOPNOTSUPP):
            await meta.setxattr(ROOT, ino, b"other.b", b"2", flags=0)
        with refused(E.E2BIG):
            await meta.setxattr(ROOT, ino, b"user.b", b"2" * 65537, flags=0)
        link = await meta.symlink(ROOT, ROOT_INO, b"l", b"target")
        with refused(E.EPERM):
            await meta.setxattr(ROOT, link.ino, b"user.b", b"2", flags=0)
        assert await meta.listxattr(link.ino) == []
        assert await meta.readlink(link.ino) == b"target"


async def test_setuid_goes_with_a_chown_and_with_a_write_by_a_user() -> None:
    async with opened(await format_volume(await new_store())) as volume:
        meta = volume.meta
        ino = await touch(volume, b"f")
        await meta.setattr(ROOT, ino, SetAttr(mode=0o6755))
        await meta.setattr(USER, ino, SetAttr(uid=5))
        assert stat.S_IMODE((await meta.getattr(ino)).mode) == 0o755
        await meta.setattr(ROOT, ino, SetAttr(mode=0o6755))
        await meta.setattr(USER, ino, SetAttr(size_bytes=5))
        assert stat.S_IMODE((await meta.getattr(ino)).mode) == 0o755


async def test_a_directory_removed_under_a_working_process_takes_no_names() -> None:
    async with opened(await format_volume(await new_store())) as volume:
        meta = volume.meta
        ino = await mkdir(volume, b"d")
        await meta.open(ino)
        await meta.rmdir(ROOT, ROOT_INO, b"d")
        with refused(E.ENOENT):
            await meta.mkdir(ROOT, ino, b"x", mode=0o755)
        await meta.release(ino)
        with refused(E.ENOENT):
            await meta.getattr(ino)


async def test_what_a_killed_session_sustained_goes_with_the_next_opening() -> None:
    store = await new_store()
    volume_store = await format_volume(store)
    async with opened(volume_store) as volume:
        killed = await volume.engine.begin_session(host="gone", pid=9, mountpoint="/gone")
        ino = await touch(volume, b"f", content=b"x" * 10)
        volume.engine.opened(killed, ino)
        await volume.meta.unlink(ROOT, ROOT_INO, b"f")
        assert await volume.read(ino) == b"x" * 10
    async with opened(volume_store) as volume:
        with refused(E.ENOENT):
            await volume.meta.getattr(ino)
        assert len((await volume.admin.status()).sessions) == 1
        assert (await volume.meta.statfs(ROOT_INO)).used_bytes == 0


async def test_slices_written_before_a_truncate_was_known_are_cut_at_its_length() -> None:
    async with opened(await format_volume(await new_store())) as volume:
        ino = await touch(volume, b"f", content=b"a" * 100)
        epoch = (await volume.meta.getattr(ino)).size_epoch
        await volume.meta.setattr(ROOT, ino, SetAttr(size_bytes=10))
        await volume.write(ino, 5, b"b" * 50, size_epoch=epoch)
        assert await volume.read(ino) == b"a" * 5 + b"b" * 5


async def test_append_places_records_at_the_end_the_owner_knows() -> None:
    async with opened(await format_volume(await new_store())) as volume:
        ino = await touch(volume, b"f", content=b"123")
        await volume.write(ino, 0, b"45", append=True)
        await volume.write(ino, 0, b"6", append=True)
        assert await volume.read(ino) == b"123456"


async def test_a_rename_over_an_open_file_sustains_it() -> None:
    async with opened(await format_volume(await new_store())) as volume:
        old, new = await touch(volume, b"old", content=b"old"), await touch(volume, b"new", content=b"new")
        await volume.meta.open(old)
        await volume.meta.rename(ROOT, ROOT_INO, b"new", ROOT_INO, b"old", flags=RenameFlags.NONE)
        assert (await volume.meta.lookup(ROOT_INO, b"old")).ino == new
        assert await volume.read(old) == b"old"
        await volume.meta.release(old)


# -- space --------------------------------------------------------------------------------------------


async def test_a_full_volume_refuses_to_promise_room_and_gives_back_what_is_not_used() -> None:
    async with opened(await format_volume(await new_store(), capacity_bytes=1 << 20)) as volume:
        meta = volume.meta
        made = await meta.create(ROOT, ROOT_INO, b"f", mode=0o644, exclusive=True)
        granted = await meta.reserve(made.inode.ino, end=600_000)
        assert granted >= 600_000
        other = await meta.create(ROOT, ROOT_INO, b"g", mode=0o644, exclusive=True)
        with pytest.raises(OutOfSpace) as full:
            await meta.reserve(other.inode.ino, end=600_000)
        assert full.value.errno == E.ENOSPC
        await meta.release(made.inode.ino)
        assert await meta.reserve(other.inode.ino, end=600_000) >= 600_000
        await volume.write(other.inode.ino, 0, b"x" * 5000)
        assert (await meta.statfs(ROOT_INO)).used_bytes == 8192
        with refused(E.ENOSPC):
            await meta.setattr(ROOT, made.inode.ino, SetAttr(size_bytes=2 << 20))
        await meta.release(other.inode.ino)


async def test_a_directory_quota_counts_its_tree_and_refuses_with_edquot() -> None:
    async with opened(await format_volume(await new_store())) as volume:
        meta, admin = volume.meta, volume.admin
        top = await mkdir(volume, b"top")
        below = await mkdir(volume, b"below", parent=top)
        ino = await touch(volume, b"f", parent=below, content=b"x" * 10_000)
        quota = await admin.quota_set(top, max_bytes=20_000, max_inodes=3)
        assert (quota.used_bytes, quota.used_inodes) == (12_288, 2)
        with refused(E.EBADF):
            await meta.reserve(ino, end=5)
        await meta.open(ino)
        with refused(E.EDQUOT):
            await meta.reserve(ino, end=30_000)
        await meta.release(ino)
        await touch(volume, b"g", parent=below)
        with refused(E.EDQUOT):
            await mkdir(volume, b"h", parent=top)
        with refused(E.EXDEV):
            await meta.rename(ROOT, top, b"below", ROOT_INO, b"below", flags=RenameFlags.NONE)
        await meta.rename(ROOT, below, b"f", ROOT_INO, b"f", flags=RenameFlags.NONE)
        assert (await admin.quotas())[0].used_bytes == 0
        big = await touch(volume, b"big", content=b"y" * 30_000)
        with refused(E.EDQUOT):
            await meta.rename(ROOT, ROOT_INO, b"big", top, b"big", flags=RenameFlags.NONE)
        with refused(E.EDQUOT):
            await meta.link(ROOT, big, top, b"big")
        await admin.quota_remove(top)
        await meta.link(ROOT, big, top, b"big")


async def test_a_commit_without_promised_room_is_refused_when_there_is_none() -> None:
    async with opened(await format_volume(await new_store(), capacity_bytes=8192)) as volume:
        ino = await touch(volume, b"f")
        with refused(E.ENOSPC):
            await volume.write(ino, 0, b"x" * 9000)
        await volume.meta.commit(ROOT, ino, Commit((), 8192, 0, mtime_ns=1))


# -- trash and clones ---------------------------------------------------------------------------------


async def test_a_removed_tree_comes_back_from_the_trash_with_its_directories() -> None:
    async with opened(await format_volume(await new_store(), trash_days=1.0)) as volume:
        meta, admin = volume.meta, volume.admin
        top = await mkdir(volume, b"top")
        below = await mkdir(volume, b"below", parent=top)
        ino = await touch(volume, b"f", parent=below, content=b"precious")
        await meta.unlink(USER, below, b"f")
        await meta.rmdir(USER, top, b"below")
        await meta.rmdir(USER, ROOT_INO, b"top")
        assert (await meta.statfs(ROOT_INO)).used_inodes == 4
        listed = await admin.trash_list(after=None, limit=10)
        assert [row.name for row in listed] == [b"f", b"below", b"top"]
        with refused(E.EPERM):
            await admin.trash_restore(Caller(uid=5), listed[2].trash_id)
        assert await admin.trash_restore(USER, listed[0].trash_id) == b"/top/below/f"
        assert await volume.read(ino) == b"precious"
        assert await admin.trash_list(after=None, limit=10) == []


async def test_expired_trash_is_gone_with_its_slices() -> None:
    async with opened(await format_volume(await new_store(), trash_days=1.0)) as volume:
        ino = await touch(volume, b"f", content=b"x")
        await volume.meta.unlink(ROOT, ROOT_INO, b"f")
        assert (await volume.meta.getattr(ino)).parent == IN_TRASH
        now_ns = volume.engine.clock_ns()
        assert await volume.admin.trash_expire(before_ns=now_ns - DAY_NS, limit=10) == 0
        assert await volume.admin.trash_expire(before_ns=now_ns + DAY_NS, limit=10) == 1
        assert await volume.admin.live_slices(after=None, limit=10) == []
        assert (await volume.meta.statfs(ROOT_INO)).used_inodes == 1


async def test_a_file_that_is_open_while_its_trash_expires_stays_until_it_is_closed() -> None:
    async with opened(await format_volume(await new_store(), trash_days=1.0)) as volume:
        ino = await touch(volume, b"f", content=b"x")
        await volume.meta.open(ino)
        await volume.meta.unlink(ROOT, ROOT_INO, b"f")
        await volume.write(ino, 4096, b"grown in the trash")
        assert await volume.problems() == []
        await volume.admin.trash_expire(before_ns=volume.engine.clock_ns() + DAY_NS, limit=10)
        assert (await volume.read(ino))[:1] == b"x"
        await volume.meta.release(ino)
        with refused(E.ENOENT):
            await volume.meta.getattr(ino)


async def test_a_clone_shares_slices_and_lives_on_without_its_original() -> None:
    async with opened(await format_volume(await new_store())) as volume:
        meta, admin = volume.meta, volume.admin
        top = await mkdir(volume, b"top")
        for number in range(120):
            await touch(volume, b"f%d" % number, parent=top, content=b"content %d" % number)
        below = await mkdir(volume, b"below", parent=top)
        await touch(volume, b"g", parent=below, content=b"deep")
        await meta.setxattr(ROOT, below, b"user.k", b"v", flags=0)
        slices = len(await admin.live_slices(after=None, limit=1000))
        usage = await admin.clone(ROOT, top, ROOT_INO, b"copy")
        assert (usage.files, usage.directories) == (121, 2)
        assert len(await admin.live_slices(after=None, limit=1000)) == slices
        with refused(E.EINVAL):
            await admin.clone(ROOT, top, below, b"x")
        with refused(E.EEXIST):
            await admin.clone(ROOT, top, ROOT_INO, b"copy")
        for number in range(120):
            await meta.unlink(ROOT, top, b"f%d" % number)
        copy = await meta.resolve(ROOT_INO, (b"copy", b"below", b"g"))
        assert await volume.read(copy[-1].ino) == b"deep"
        assert await meta.getxattr(copy[1].ino, b"user.k") == b"v"
        assert (await admin.usage(copy[0].ino)).files == 121


async def test_a_clone_that_does_not_fit_leaves_nothing_behind() -> None:
    async with opened(await format_volume(await new_store(), max_inodes=100)) as volume:
        top = await mkdir(volume, b"top")
        for number in range(60):
            await touch(volume, b"f%d" % number, parent=top, content=b"x")
        before = await volume.meta.statfs(ROOT_INO)
        with refused(E.ENOSPC):
            await volume.admin.clone(ROOT, top, ROOT_INO, b"copy")
        assert await volume.meta.statfs(ROOT_INO) == before


async def test_fsck_finds_and_repairs_what_was_broken_by_hand() -> None:
    store = await format_volume(await new_store())
    async with opened(store) as volume:
        ino = await touch(volume, b"f", content=b"x")
        top = await mkdir(volume, b"d")

        def damage(tx: Tx) -> None:
            tx.put(INODE, tx.inode(ino)._replace(nlink=7))
            tx.delete(DENTRY, (ROOT_INO, b"d"))
            tx.put(COUNTER, Counter("used_bytes", 12345))

        await volume.engine.run(damage)
        found = [problem.code async for problem in volume.admin.check(repair=True)]
        assert {"inode", "inode-without-name", "counter"} <= set(found)
        assert await volume.problems() == []
        lost = (await volume.admin.trash_list(after=None, limit=10))[0]
        assert lost.ino == top
        assert await volume.admin.trash_restore(ROOT, lost.trash_id) == b"/lost-%d" % top
