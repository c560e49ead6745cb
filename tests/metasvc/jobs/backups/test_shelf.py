"""Backups as objects in a directory: when one exists, what is partial, and reading and removing them."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest

from chunkstore.buckets.directory import DirectoryStore
from chunkstore.errors import FormatUnsupported
from metasvc.api.dump_stream import DumpDamaged
from metasvc.jobs.backups.shelf import Manifest, Shelf, all_manifests, new_name, part_key, read_backup

UUID = "11111111-2222-3333-4444-555555555555"
OTHER = "99999999-2222-3333-4444-555555555555"


def manifest(name: str, *, made_ns: int = 1, uuid: str = UUID, parts: int = 3) -> Manifest:
    return Manifest(
        name=name,
        uuid=uuid,
        tenant="acme",
        volume="data",
        made_ns=made_ns,
        finished_ns=made_ns + 5,
        last_batch=7,
        rows=100,
        inodes=50,
        parts=parts,
        size_bytes=30,
        window_s=60,
    )


@pytest.fixture
def bucket(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(str(tmp_path))


def test_names_are_times_and_never_the_same() -> None:
    names = {new_name(1_790_000_000_123_456_789) for _ in range(100)}
    assert len(names) == 100
    assert {name[:17] for name in names} == {"20260921t141320z-"}


async def test_a_backup_exists_when_its_manifest_does(bucket: DirectoryStore) -> None:
    shelf = Shelf(bucket, UUID)
    name = new_name(time.time_ns())
    for number in range(3):
        await shelf.put_part(name, number, b"%d" % number * 10)
    assert await shelf.manifests() == []
    assert [found for found, _ in await shelf.partial()] == [name]
    await shelf.put_manifest(manifest(name))
    assert await shelf.manifests() == [manifest(name)]
    assert await shelf.partial() == []
    assert b"".join([part async for part in read_backup(bucket, manifest(name))]) == b"0" * 10 + b"1" * 10 + b"2" * 10
    await shelf.remove(name)
    assert await shelf.manifests() == []
    assert await shelf.partial() == []
    assert [info async for info in bucket.list("backups/")] == []


async def test_all_volumes_of_a_bucket_are_found_oldest_first_and_each_shelf_has_its_own(
    bucket: DirectoryStore,
) -> None:
    made = [manifest(new_name(n), made_ns=n, uuid=(UUID, OTHER)[n % 2]) for n in (5, 2, 9, 4)]
    for each in made:
        await Shelf(bucket, each.uuid).put_manifest(each)
    refused: list[str] = []
    assert [each.made_ns for each in await all_manifests(bucket, refused=refused.append)] == [2, 4, 5, 9]
    assert [each.made_ns for each in await Shelf(bucket, UUID).manifests()] == [2, 4]
    assert refused == []


async def test_many_parts_of_many_names_take_one_listing_for_each_name(bucket: DirectoryStore) -> None:
    shelf = Shelf(bucket, UUID)
    names = sorted(new_name(n * 10**9) for n in range(5))
    for name in names:
        for number in range(20):
            await shelf.put_part(name, number, b"x")
    for name in names[1:3]:
        await shelf.put_manifest(manifest(name))
    found = await shelf.partial()
    assert [name for name, _ in found] == [names[0], names[3], names[4]]
    assert all(abs(time.time_ns() - mtime_ns) < 3600e9 for _, mtime_ns in found)


async def test_a_part_that_is_missing_is_told_and_reading_ends(bucket: DirectoryStore) -> None:
    shelf = Shelf(bucket, UUID)
    name = new_name(1)
    await shelf.put_part(name, 0, b"zero")
    await shelf.put_part(name, 2, b"two")
    parts = read_backup(bucket, manifest(name))
    assert await anext(parts) == b"zero"
    with pytest.raises(DumpDamaged, match=f"{name} lacks part 1"):
        await anext(parts)


async def test_what_is_no_manifest_stops_an_owner_and_not_somebody_who_looks(bucket: DirectoryStore) -> None:
    shelf = Shelf(bucket, UUID)
    name = new_name(1)
    good = manifest(name)
    await shelf.put_manifest(good)
    place = f"backups/manifests/{UUID}/"
    document = json.loads(good.packed())
    await bucket.put(f"{place}{new_name(2)}", b"not json")
    await bucket.put(f"{place}{new_name(3)}", good.packed())  # of another name
    await bucket.put(f"{place}{new_name(4)}", json.dumps({**document, "version": 2, "new": 1}).encode())
    await bucket.put(f"{place}{new_name(5)}", json.dumps({**document, "made_ns": "1"}).encode())
    refused: list[str] = []
    assert await all_manifests(bucket, refused=refused.append) == [good]
    assert len(refused) == 4
    assert all("remove that object" in text or "upgrade" in text for text in refused)
    with pytest.raises((DumpDamaged, FormatUnsupported)):
        await shelf.manifests()


def test_a_manifest_is_what_the_documentation_says() -> None:
    text = (Path(__file__).parents[4] / "docs" / "format.md").read_text()
    section = text.split("## Backups, version 1\n")[1].split("\n## ")[0]
    for field in ("version", *(each.name for each in dataclasses.fields(Manifest))):
        assert f"`{field}`" in section, field
    assert part_key("{uuid}", "{name}", 0).replace("00000000", "{number}") in section
    assert os.path.dirname(part_key("U", "N", 0)) == "backups/parts/U/N"
