"""What mountinfo says, read as proc(5) writes it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from client.mounts import is_dead, mounts_at, parse_mountinfo, place_of, read_mounts

MOUNTINFO = (
    "27 1 253:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
    "40 27 0:52 / /mnt/my\\040volume rw,nosuid,nodev master:2 shared:7 - fuse.atoll /srv/vol\\134x rw,user_id=0\n"
    "41 27 0:52 /sub /mnt/bound ro - fuse.atoll /srv/vol ro\n"
    "a line of another form\n"
    "\n"
)


def test_fields_are_found_behind_any_number_of_optional_ones_and_unescaped() -> None:
    root, volume, bound = parse_mountinfo(MOUNTINFO)
    assert (root.mountpoint, root.is_ours, root.mount_id) == ("/", False, 27)
    assert (volume.mountpoint, volume.source, volume.read_only) == ("/mnt/my volume", "/srv/vol\\x", False)
    assert (bound.root, bound.read_only, bound.device) == ("/sub", True, volume.device)
    assert volume.is_ours
    assert mounts_at("/mnt/bound", [root, volume, bound]) == [bound]


def test_the_kernel_says_which_mount_a_path_lies_on(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    (tmp_path / "link").symlink_to("/proc/self")
    place = place_of(str(file))
    assert os.path.realpath(place.mount.mountpoint + os.fsdecode(place.path)) == os.path.realpath(file)
    assert place_of(str(tmp_path / "link")).mount.fstype == "proc"
    assert place_of(str(tmp_path / "link"), follow=False).path.endswith(b"/link")
    with pytest.raises(FileNotFoundError):
        place_of(str(tmp_path / "absent"))


def test_a_directory_that_answers_is_not_dead(tmp_path: Path) -> None:
    assert not is_dead(str(tmp_path))
    assert not is_dead(str(tmp_path / "absent"))
    assert any(mount.mountpoint == "/proc" for mount in read_mounts())
