"""Keys of buckets in the store: nobody reads them without the master key, and they are nobody else's."""

from __future__ import annotations

import base64
import logging
import os
import secrets
from dataclasses import replace
from pathlib import Path

import pytest

from chunkstore.errors import AtollError
from client.meta.endpoint import Endpoint, Untrusted
from client.meta.keys import can_keep_keys, give_keys
from metasvc.api import atoll_pb2 as pb
from metasvc.api.bucket_keys import BucketKeysInvalid, check_keys, keys_in
from metasvc.api.server import Server
from metasvc.engine import first_rows
from metasvc.model import VolumeFormat
from metasvc.server.keys import BucketKeys, KeysLocked, MasterKeyInvalid, MasterKeys
from metasvc.store import Store
from metasvc.store.memory import MemoryStore
from tests.metasvc.engine.volumes import volume_format
from tests.metasvc.server.served import Served, served
from tests.metasvc.store.kinds import KINDS, new_store_of
from tests.servers.fixtures import Servers

SECRET = "what-only-the-service-knows"
KEYS = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": SECRET}
OLD, NEW = os.urandom(32), os.urandom(32)


def form_of(number: int, **options: object) -> VolumeFormat:
    form = volume_format(tenant="acme", name=f"v{number}", uuid=f"00000000-0000-0000-0000-00000000000{number}")
    return replace(form, bucket_url="s3://bucket/prefix", **options)  # type: ignore[arg-type]


async def store_with(*forms: VolumeFormat) -> MemoryStore:
    store = MemoryStore()
    for form in forms:
        await store.create_volume(form, first_rows(form))
    return store


def all_values(store: Store) -> bytes:
    return repr(vars(store)).encode()


@pytest.mark.parametrize("kind", KINDS)
async def test_keys_are_kept_replaced_and_forgotten(kind: str, tmp_path: Path, servers: Servers) -> None:
    store = await new_store_of(kind, tmp_path, servers)
    try:
        keys = BucketKeys(store, MasterKeys([OLD]))
        form, other = form_of(1), form_of(2)
        assert await keys.of(form) is None
        await keys.put(form, KEYS)
        await keys.put(other, {**KEYS, "AWS_REGION": "there"})
        await keys.put(form, {**KEYS, "AWS_ACCESS_KEY_ID": "another"})
        assert await keys.of(form) == {**KEYS, "AWS_ACCESS_KEY_ID": "another"}
        assert await keys.of(other) == {**KEYS, "AWS_REGION": "there"}
        for sealed in (await store.settings("keys/")).values():
            assert SECRET.encode() not in sealed
            assert b"AWS_" not in sealed
        await keys.forget(form)
        assert await keys.of(form) is None
    finally:
        await store.close()


async def test_a_value_that_was_moved_or_altered_does_not_decrypt() -> None:
    forms = form_of(1), form_of(2)
    store = await store_with(*forms)
    keys = BucketKeys(store, MasterKeys([OLD]))
    await keys.put(forms[0], KEYS)
    sealed = await store.setting(f"keys/{forms[0].uuid}")
    assert sealed is not None
    await store.create_setting(f"keys/{forms[1].uuid}", sealed)
    with pytest.raises(KeysLocked):
        await keys.of(forms[1])
    with pytest.raises(KeysLocked):
        await keys.of(replace(forms[0], tenant="other"))
    for position in range(len(sealed)):
        altered = bytearray(sealed)
        altered[position] ^= 1
        store = await store_with(forms[0])
        await store.create_setting(f"keys/{forms[0].uuid}", bytes(altered))
        with pytest.raises(KeysLocked) as told:
            await BucketKeys(store, MasterKeys([OLD])).of(forms[0])
        assert SECRET not in str(told.value)
    for cut in (sealed[:0], sealed[:1], sealed[:9], sealed[:25]):
        with pytest.raises(KeysLocked):
            MasterKeys([OLD]).open(cut, bound_to=b"")


async def test_a_nonce_is_never_used_twice() -> None:
    master = MasterKeys([OLD])
    assert len({master.seal(b"same", bound_to=b"")[9:21] for _ in range(2000)}) == 2000


async def test_master_keys_are_rotated() -> None:
    forms = [form_of(number) for number in (1, 2, 3)]
    store = await store_with(*forms)
    for form in forms:
        await BucketKeys(store, MasterKeys([OLD])).put(form, {**KEYS, "AWS_ACCESS_KEY_ID": form.name})
    await store.create_setting("keys/of-a-volume-that-was-deleted", MasterKeys([OLD]).seal(b"{}", bound_to=b""))
    with pytest.raises(KeysLocked, match="behind the first"):
        await BucketKeys(store, MasterKeys([NEW])).check()
    with pytest.raises(KeysLocked, match="--master-key-file"):
        await BucketKeys(store, None).check()
    both = BucketKeys(store, MasterKeys([NEW, OLD]))
    await both.check()
    assert (await both.of(forms[0]) or {})["AWS_ACCESS_KEY_ID"] == "v1"
    assert await both.rotate() == 3
    assert await both.rotate() == 0
    alone = BucketKeys(store, MasterKeys([NEW]))
    await alone.check()
    for form in forms:
        assert (await alone.of(form) or {})["AWS_ACCESS_KEY_ID"] == form.name


@pytest.mark.parametrize("text", ["", " \n", "short", base64.b64encode(bytes(31)).decode(), "#" * 44])
def test_what_is_no_master_key_is_refused_and_not_shown(text: str, tmp_path: Path) -> None:
    path = tmp_path / "master"
    path.write_text(text)
    with pytest.raises(MasterKeyInvalid) as told:
        MasterKeys.find(str(path), env={})
    assert "base64" in str(told.value)
    assert not text.strip() or text not in str(told.value)


def test_master_keys_come_from_a_file_or_from_the_environment(tmp_path: Path) -> None:
    old, new = (base64.b64encode(key).decode() for key in (OLD, NEW))
    path = tmp_path / "master"
    path.write_text(f"{new}\n{old}\n")
    sealed = MasterKeys([OLD]).seal(b"text", bound_to=b"it")
    for found in (MasterKeys.find(str(path), env={}), MasterKeys.find(None, env={"ATOLL_MASTER_KEY": f"{new} {old}"})):
        assert found is not None
        assert found.open(sealed, bound_to=b"it") == b"text"
        assert not found.is_first(sealed)
    assert MasterKeys.find(None, env={}) is None
    with pytest.raises(MasterKeyInvalid, match="No such file"):
        MasterKeys.find(str(tmp_path / "absent"), env={})


def test_only_keys_of_the_kind_of_bucket_are_taken_and_never_names_of_files(tmp_path: Path) -> None:
    env = {**KEYS, "AWS_REGION": "there", "HOME": "/root", "AZURE_STORAGE_ACCOUNT_KEY": "x"}
    assert keys_in("s3://b", env) == {**KEYS, "AWS_REGION": "there"}
    assert keys_in("s3://b", {"AWS_REGION": "there"}) == {}
    assert keys_in("file:///b", env) == {}
    account = tmp_path / "account.json"
    account.write_text('{"type": "service_account"}')
    assert keys_in("gs://b", {"GOOGLE_APPLICATION_CREDENTIALS": str(account)}) == {
        "GOOGLE_SERVICE_ACCOUNT_KEY": account.read_text()
    }
    account.write_text('{"type": "authorized_user"}')
    with pytest.raises(BucketKeysInvalid, match="service account"):
        keys_in("gs://b", {"GOOGLE_APPLICATION_CREDENTIALS": str(account)})
    assert check_keys("s3://b", KEYS) == KEYS
    for keys in (
        {**KEYS, "GOOGLE_APPLICATION_CREDENTIALS": "/etc/shadow"},
        {**KEYS, "LD_PRELOAD": "x"},
        {"AWS_ACCESS_KEY_ID": "id"},
        {**KEYS, "AWS_SESSION_TOKEN": "x" * 20000},
    ):
        with pytest.raises(BucketKeysInvalid) as told:
            check_keys("s3://b", keys)
        assert SECRET not in str(told.value)
    for url in ("file:///b", "file:objects"):
        with pytest.raises(BucketKeysInvalid):
            check_keys(url, KEYS)


async def test_a_service_keeps_the_keys_that_an_administrator_gives(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    store = await store_with(form_of(1), form_of(2))
    keys = BucketKeys(store, MasterKeys([OLD]))
    async with served(store, name="acme/v1", keys=keys) as service:
        assert await can_keep_keys(service.endpoint(), "acme/v1")
        assert await can_keep_keys(service.endpoint(), "acme/none-yet")
        volume = await service.volume()
        assert await volume.access.kept() is None
        await give_keys(service.endpoint(), "acme/v1", KEYS)
        assert await volume.access.kept() == KEYS
        assert await keys.of(form_of(2)) is None
        for wrong in ({"LD_PRELOAD": SECRET}, {}):
            with pytest.raises(AtollError) as told:
                await give_keys(service.endpoint(), "acme/v1", wrong)
            assert SECRET not in str(told.value)
        assert await volume.access.kept() == KEYS
        user = await _token(service, "v1")
        for endpoint in (Endpoint([Server("127.0.0.1", service.port)], user),):
            with pytest.raises(AtollError, match="administrator"):
                await give_keys(endpoint, "acme/v1", KEYS)
            with pytest.raises(AtollError, match="administrator"):
                await can_keep_keys(endpoint, "acme/v1")
        assert SECRET not in caplog.text
        assert SECRET.encode() not in all_values(store)
        await service.stop()
        await service.start()
        assert await (await service.volume()).access.kept() == KEYS
        assert service.volumes is not None
        await service.volumes.delete("acme", "v1")
        # Its objects are deleted with them: see test_object_urls.py.
        assert [*await store.settings("keys/")] == [f"keys/{form_of(1).uuid}"]
        await service.volumes.deleted.forget("acme", form_of(1).uuid)
    assert await store.settings("keys/") == {}


async def _token(service: Served, volume: str) -> str:
    request = pb.ManageRequest(create_token=pb.CreateToken(tenant="acme", volume=volume))
    reply = pb.ManageReply.FromString(await service.endpoint().ask(pb.Opening.MANAGE, request.SerializeToString()))
    return reply.token


async def test_a_service_without_a_master_key_says_so() -> None:
    store = await store_with(form_of(1))
    async with served(store, name="acme/v1", keys=BucketKeys(store, None)) as service:
        assert not await can_keep_keys(service.endpoint(), "acme/v1")
        with pytest.raises(AtollError, match="--master-key-file"):
            await give_keys(service.endpoint(), "acme/v1", KEYS)


async def test_keys_are_not_sent_where_others_could_listen() -> None:
    elsewhere = Endpoint([Server("192.0.2.1", 9410)], "token", is_plain_allowed=True)
    with pytest.raises(Untrusted, match="atolls://"):
        await give_keys(elsewhere, "acme/v1", {"AWS_SECRET_ACCESS_KEY": secrets.token_hex()})
