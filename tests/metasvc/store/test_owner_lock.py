"""The lock file that says whether an owner lives."""

from __future__ import annotations

from pathlib import Path

from metasvc.store.sqlite.owner_lock import Holder, OwnerLock


def test_one_of_two_gets_the_lock_and_signs_it(tmp_path: Path) -> None:
    first, second = (OwnerLock(str(tmp_path / "meta.db"), 7) for _ in range(2))
    assert first.path == f"{tmp_path}/meta.db.7.owner"
    assert first.holder() is None
    assert first.try_lock()
    assert first.try_lock()  # it has it already
    assert second.holder() is None  # not signed yet
    first.sign("host-1:4711, mounted at /a b")
    assert not second.try_lock()
    holder = second.holder()
    assert holder is not None
    assert holder == Holder(holder.pid, "host-1:4711, mounted at /a b")
    first.unlock()
    first.unlock()
    assert second.holder() is None
    assert second.try_lock()
    assert not first.try_lock()
    second.unlock(remove=True)
    assert not Path(second.path).exists()
    assert first.try_lock()
    first.unlock(remove=True)


def test_a_signature_replaces_a_longer_one(tmp_path: Path) -> None:
    lock = OwnerLock(str(tmp_path / "meta.db"), 1)
    assert lock.try_lock()
    for address in ("a very long address indeed", "short", "l\u00f6ng\nand torn"):
        lock.sign(address)
        holder = lock.holder()
        assert holder is not None
        assert holder.address == address.partition("\n")[0]
    lock.unlock()


def test_other_volumes_have_other_locks(tmp_path: Path) -> None:
    locks = [OwnerLock(str(tmp_path / "meta.db"), volume_id) for volume_id in (1, 2, 11)]
    assert all(lock.try_lock() for lock in locks)
    for lock in locks:
        lock.unlock()


def test_a_file_that_is_removed_between_opening_and_locking_is_no_lock(tmp_path: Path) -> None:
    leaving = OwnerLock(str(tmp_path / "meta.db"), 1)
    assert leaving.try_lock()

    class Late(OwnerLock):
        """Opens the file just before its owner removes it."""

        def _open(self) -> int:
            descriptor = super()._open()
            leaving.unlock(remove=True)
            return descriptor

    late, third = Late(str(tmp_path / "meta.db"), 1), OwnerLock(str(tmp_path / "meta.db"), 1)
    assert late.try_lock()
    assert Path(late.path).exists()
    assert not third.try_lock()
    late.unlock()
