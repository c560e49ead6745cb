"""What a mount leaves noted in its volume's directory, read with care."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chunkstore.geometry import SliceId
from client.address import EmbeddedAddress
from client.staged import RECORD_NAME, MountRecord, read_record, staged_before, write_record
from metasvc.model import VolumeFormat

RECORD = MountRecord(pid=7, host="node", mountpoint="/mnt", cache_dir="/cache", log_path="/cache/x.log", started_ns=5)


def volume_format(uuid: str) -> VolumeFormat:
    return VolumeFormat(uuid, "local", "default", "file:objects", 4 << 20, "zstd:1", 32768, 0, 0, 1.0, 1)


def test_a_record_is_read_as_it_was_written_and_is_the_users_alone(tmp_path: Path) -> None:
    address = EmbeddedAddress(str(tmp_path))
    assert read_record(address.directory) is None
    write_record(address.directory, RECORD)
    assert read_record(address.directory) == RECORD
    assert [path.name for path in tmp_path.iterdir()] == [RECORD_NAME]
    assert (tmp_path / RECORD_NAME).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\xff", b'{"version":2}', b'{"version":1,"pid":"x"}', b"[" * 9999]
)
def test_other_content_is_no_record(tmp_path: Path, content: bytes) -> None:
    (tmp_path / RECORD_NAME).write_bytes(content)
    assert read_record(str(tmp_path)) is None


def test_fields_of_other_types_are_no_record(tmp_path: Path) -> None:
    address = EmbeddedAddress(str(tmp_path))
    write_record(address.directory, RECORD)
    document = json.loads((tmp_path / RECORD_NAME).read_text())
    (tmp_path / RECORD_NAME).write_text(json.dumps({**document, "cache_dir": 7}))
    assert read_record(address.directory) is None


def test_staged_slices_are_read_from_the_names_in_the_cache(tmp_path: Path) -> None:
    address = EmbeddedAddress(str(tmp_path))
    assert staged_before(address, volume_format("u")).lengths == {}
    cache = tmp_path / "cache"
    write_record(address.directory, MountRecord(7, "node", "/mnt", str(cache), "", 5))
    assert staged_before(address, volume_format("u")).size_bytes == 0
    staged = cache / "u" / "staged"
    staged.mkdir(parents=True)
    for name in (f"a-{1 << 20:x}-{'0' * 32}", f"1f-5-{'1' * 32}", "something else"):
        (staged / name).touch()
    found = staged_before(address, volume_format("u"))
    assert (found.lengths, found.cache_dir) == ({SliceId(10): 1 << 20, SliceId(31): 5}, str(cache))
    assert found.size_bytes == (1 << 20) + 5
