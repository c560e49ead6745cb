"""URLs of objects for administrators: for whom, of which objects; and volumes that were deleted, until their objects are."""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from urllib.parse import parse_qs, urlsplit

import pytest

from chunkstore.buckets.signed import Verb
from chunkstore.errors import AtollError
from client.meta.admin import create_volume
from client.meta.endpoint import AccessRefused, Endpoint
from client.meta.loading import load_volume
from client.meta.managing import RemoteManaging
from client.meta.signing import ObjectSigning
from metasvc.api import atoll_pb2 as pb
from metasvc.api.server import Server
from metasvc.engine import first_rows
from metasvc.errors import FsError, StoreError, VolumeExists, VolumeMissing
from metasvc.jobs.backups.shelf import part_key, prefixes_of
from metasvc.model import ROOT_INO, VolumeFormat
from metasvc.server.audit import Commands
from metasvc.server.keys import BucketKeys, KeysLocked, MasterKeys
from metasvc.server.rights import EVERYTHING
from metasvc.store.memory import MemoryStore
from tests.metasvc.engine.test_dump import stream
from tests.metasvc.engine.volumes import ROOT
from tests.metasvc.server.served import Served, connected, served
from tests.metasvc.server.test_keys import KEYS, NEW, OLD, SECRET, form_of

UUID = form_of(1).uuid
OTHER = form_of(2).uuid
BLOCK = f"{UUID}/0/1.0"
MANIFESTS, PARTS = prefixes_of(UUID)


class Bad(MemoryStore):
    """A store that fails once when a volume is to be deleted."""

    is_failing = False

    async def delete_volume(self, tenant: str, name: str) -> None:
        if self.is_failing:
            self.is_failing = False
            raise StoreError("the database is away")
        await super().delete_volume(tenant, name)


@asynccontextmanager
async def serving(*forms: VolumeFormat, keys: bool = True) -> AsyncIterator[Served]:
    store = Bad()
    kept = BucketKeys(store, MasterKeys([OLD]))
    for form in forms or (form_of(1),):
        await store.add_tenant(form.tenant, created_ns=1)
        await store.create_volume(form, first_rows(form))
        if keys:
            await kept.put(form, KEYS)
    async with served(store, name="acme/v1", keys=kept) as service:
        yield service


def signing(service: Served, *, token: str = "", volume: str = "acme/v1", deleted_uuid: str = "") -> ObjectSigning:
    endpoint = Endpoint([Server("127.0.0.1", service.port)], token or service.token)
    return ObjectSigning(endpoint, volume, deleted_uuid=deleted_uuid)


async def token(service: Served, *, tenant: str = "acme", volume: str = "", path: Sequence[bytes] = ()) -> str:
    return (await managing(service).create_token(pb.CreateToken(tenant=tenant, volume=volume, path=path)))[0]


def managing(service: Served, token: str = "") -> RemoteManaging:
    return RemoteManaging(Endpoint([Server("127.0.0.1", service.port)], token or service.token))


async def test_administrators_get_urls_of_one_verb_each_that_are_good_for_minutes() -> None:
    async with serving() as service:
        for who in (service.token, await token(service)):
            sign = signing(service, token=who)
            for verb in ("head", "get", "delete"):
                urls = await sign.sign(verb, [BLOCK, part_key(UUID, "n", 1), MANIFESTS + "n"])
                assert [urlsplit(url).path.removeprefix("/prefix/") for url in urls] == [
                    BLOCK,
                    f"{PARTS}n/00000001",
                    f"{MANIFESTS}n",
                ]
                assert len(set(urls)) == 3
            for prefix in (f"{UUID}/", f"{UUID}/0/", MANIFESTS, PARTS, f"{PARTS}n/"):
                [url] = await sign.sign("list", [prefix])
                asked = parse_qs(urlsplit(url).query)
                assert (asked["prefix"], asked["list-type"], asked["max-keys"]) == (
                    [f"prefix/{prefix}"],
                    ["2"],
                    ["1000"],
                )
                assert urlsplit(url).path == "/"
                assert int(asked["X-Amz-Expires"][0]) <= 300
            [url] = await sign.sign("list", [f"{UUID}/"], start_after=BLOCK)
            assert parse_qs(urlsplit(url).query)["start-after"] == [f"prefix/{BLOCK}"]
            assert len(await sign.sign("delete", [f"{UUID}/0/{number:x}.0" for number in range(256)])) == 256


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        UUID,
        f"{UUID}/",
        f"/{BLOCK}",
        f"{OTHER}/0/1.0",
        f"{UUID}0/0/1.0",
        f"{UUID}/../{OTHER}/0/1.0",
        f"{UUID}/./1.0",
        f"{UUID}//1.0",
        f"{UUID}/0/1.0/",
        f"{UUID}/0/..",
        f"x/{BLOCK}",
        f"{UUID}/{'x' * 1024}",
        "backups/manifests/",
        MANIFESTS,
        f"backups/manifests/{OTHER}/n",
        f"backups/parts/{OTHER}/n/00000001",
        f"backups/{UUID}/n",
        f"backups/manifests/{UUID}",
        f"{MANIFESTS}../../../{OTHER}/0/1.0",
    ],
)
async def test_keys_and_prefixes_out_of_the_volume_are_refused(key: str) -> None:
    async with serving(form_of(1), form_of(2)) as service:
        sign = signing(service)
        for verb in ("head", "get", "delete"):
            for keys in ([key], [BLOCK, key]):
                with pytest.raises(FsError) as refused:
                    await sign.sign(verb, keys)
                assert refused.value.errno == errno.EINVAL
        prefix = key if key.endswith("/") else f"{key}/"
        if prefix not in (f"{UUID}/", MANIFESTS, f"{UUID}/0/1.0/"):
            with pytest.raises(FsError) as refused:
                await sign.sign("list", [prefix])
            assert refused.value.errno == errno.EINVAL
        with pytest.raises(FsError):
            await sign.sign("list", [MANIFESTS], start_after=key.removeprefix(MANIFESTS) or "x")


async def test_what_is_no_request_is_refused() -> None:
    async with serving() as service:
        sign = signing(service)
        asked: list[tuple[Verb, list[str], str]] = [
            ("get", [], ""),
            ("get", [BLOCK] * 257, ""),
            ("get", [BLOCK], BLOCK),
            ("list", [], ""),
            ("list", [f"{UUID}/", f"{UUID}/0/"], ""),
            ("list", [f"{UUID}"], ""),
            ("list", [""], ""),
            ("list", [f"{UUID}/0/"], f"{UUID}/0/../../x"),
            ("list", [f"{UUID}/0/"], f"{UUID}/1/1.0"),
        ]
        for verb, keys, start_after in asked:
            with pytest.raises(FsError) as refused:
                await sign.sign(verb, keys, start_after=start_after)
            assert refused.value.errno == errno.EINVAL
        message = pb.AdminRequest(sign_objects=pb.SignObjects(verb=9, keys=[BLOCK]))  # type: ignore[arg-type]
        answer = await service.endpoint().ask(pb.Opening.ADMINISTER, message.SerializeToString(), volume="acme/v1")
        assert pb.AdminReply.FromString(answer).failure.errno == errno.EINVAL


async def test_nobody_but_administrators_of_the_tenant_gets_any() -> None:
    foreign = replace(form_of(3), tenant="other")
    async with serving(form_of(1), form_of(2), foreign) as service, connected(service) as client:
        await client.meta.mkdir(ROOT, ROOT_INO, b"inside", mode=0o755)
        tokens = {
            "a user": await token(service, volume="v1"),
            "a subtree": await token(service, volume="v1", path=[b"inside"]),
            "another volume": await token(service, volume="v2"),
            "another tenant's administrator": await token(service, tenant="other"),
            "another tenant's user": await token(service, tenant="other", volume="v3"),
        }
        for who, text in tokens.items():
            sign = signing(service, token=text)
            for verb in ("list", "head", "get", "delete"):
                with pytest.raises(AccessRefused, match=r"administrator|not for acme/v1") as refused:
                    await sign.sign(verb, [f"{UUID}/" if verb == "list" else BLOCK])
                assert refused.value.errno == errno.EACCES, who
        # Each reaches its own.
        assert await signing(service, token=tokens["another tenant's administrator"], volume="other/v3").sign(
            "list", [f"{foreign.uuid}/"]
        )


async def test_a_volume_without_kept_keys_has_none() -> None:
    async with serving(keys=False) as service:
        with pytest.raises(FsError) as refused:
            await signing(service).sign("get", [BLOCK])
        assert refused.value.errno == errno.ENOTSUP


def audit(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "atoll.audit"]


async def test_a_command_has_one_line_for_each_verb_in_the_audit_log_and_refusals_each_have_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with serving() as service:
        user = await token(service, volume="v1")
        caplog.clear()
        one, two = signing(service), signing(service)
        for _ in range(3):
            await one.sign("list", [f"{UUID}/"])
            await one.sign("delete", [BLOCK])
        await two.sign("delete", [BLOCK])
        lines = audit(caplog)
        assert [line.partition(" by ")[0].removeprefix("audit: ") for line in lines] == [
            "sign URLs that list objects of acme/v1",
            "sign URLs that delete objects of acme/v1",
            "sign URLs that delete objects of acme/v1",
        ]
        assert all(line.endswith(": done") for line in lines)
        caplog.clear()
        refused = signing(service, token=user)
        for _ in range(2):
            with pytest.raises(AccessRefused):
                await refused.sign("delete", [BLOCK])
            with pytest.raises(FsError):
                await one.sign("delete", [f"{OTHER}/0/1.0"])
        assert len(audit(caplog)) == 4
        assert all("failed" in line for line in audit(caplog))
        assert SECRET not in caplog.text
        assert "X-Amz" not in caplog.text


def test_a_command_has_another_line_after_a_quarter_of_an_hour_and_one_without_a_name_always(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    now_s = 0.0
    commands = Commands(clock=lambda: now_s)

    def call(command: bytes) -> int:
        before = len(audit(caplog))
        with commands.audited(EVERYTHING, "peer", "do", "it", command=command):
            pass
        return len(audit(caplog)) - before

    assert [call(b"a"), call(b"a"), call(b"b"), call(b""), call(b"")] == [1, 0, 1, 1, 1]
    now_s = 899.0
    assert call(b"a") == 0
    now_s = 901.0
    assert [call(b"a"), call(b"a")] == [1, 0]
    for number in range(1000):
        call(b"c%d" % number)
    assert call(b"a") == 1


# -- volumes that were deleted --------------------------------------------------------------------------------------------


async def test_a_deleted_volume_is_remembered_with_its_keys_until_its_objects_are_gone() -> None:
    async with serving(form_of(1), form_of(2)) as service:
        store, asks = service.store, managing(service)
        assert await asks.deleted_volumes("acme", "v1") == []
        with pytest.raises(FsError, match="no deleted volume"):
            await signing(service, deleted_uuid=UUID).sign("delete", [BLOCK])
        form = await asks.delete_volume("acme/v1")
        for _ in range(2):
            assert await asks.deleted_volumes("acme", "v1") == [form]
            assert await asks.deleted_volumes("acme", "v2") == []
            sign = signing(service, deleted_uuid=UUID)
            assert await sign.sign("list", [f"{UUID}/"])
            assert await sign.sign("delete", [BLOCK, MANIFESTS + "n"])
            for wrong in (f"{OTHER}/0/1.0", f"{UUID}/../x"):
                with pytest.raises(FsError) as refused:
                    await sign.sign("delete", [wrong])
                assert refused.value.errno == errno.EINVAL
            with pytest.raises(AtollError):
                await signing(service).sign("delete", [BLOCK])
            # Its names are gone.
            with pytest.raises(VolumeMissing):
                await asks.delete_volume("acme/v1")
            await service.stop()
            await service.start()
            asks = managing(service)
        await asks.forget_deleted("acme", UUID)
        assert await asks.deleted_volumes("acme", "v1") == []
        assert [*await store.settings("keys/")] == [f"keys/{OTHER}"]
        assert await store.settings("deleted/") == {}
        with pytest.raises(FsError, match="no deleted volume"):
            await signing(service, deleted_uuid=UUID).sign("delete", [BLOCK])
        with pytest.raises(FsError, match="no deleted volume"):
            await asks.forget_deleted("acme", UUID)
        # Of a volume that is there nothing is forgotten.
        with pytest.raises(FsError, match="no deleted volume"):
            await asks.forget_deleted("acme", OTHER)
        assert await signing(service, volume="acme/v2").sign("get", [f"{OTHER}/0/1.0"])


async def test_only_administrators_of_the_tenant_reach_deleted_volumes() -> None:
    foreign = replace(form_of(3), tenant="other")
    async with serving(form_of(1), form_of(2), foreign) as service:
        for who in (await token(service, volume="v2"), await token(service, tenant="other")):
            await _delete_if_there(service)
            with pytest.raises(AtollError, match="administrator"):
                await managing(service, who).deleted_volumes("acme", "v1")
            with pytest.raises(AtollError, match="administrator"):
                await managing(service, who).forget_deleted("acme", UUID)
            for volume in ("acme/v1", "acme/v2", "other/v3"):
                with pytest.raises(AtollError) as refused:
                    await signing(service, token=who, volume=volume, deleted_uuid=UUID).sign("delete", [BLOCK])
                assert refused.value.errno in (errno.EACCES, errno.ENOENT)
        assert len(await managing(service, await token(service)).deleted_volumes("acme", "v1")) == 1


async def _delete_if_there(service: Served) -> None:
    if not await managing(service).deleted_volumes("acme", "v1"):
        await managing(service).delete_volume("acme/v1")


async def test_a_deletion_that_fails_before_the_rows_are_gone_leaves_the_volume_as_it_was() -> None:
    async with serving() as service:
        assert isinstance(service.store, Bad)
        service.store.is_failing = True
        asks = managing(service)
        with pytest.raises(AtollError, match="the database is away"):
            await asks.delete_volume("acme/v1")
        assert await service.store.settings("deleted/") != {}
        assert await asks.deleted_volumes("acme", "v1") == []
        with pytest.raises(FsError, match="no deleted volume"):
            await signing(service, deleted_uuid=UUID).sign("delete", [BLOCK])
        with pytest.raises(FsError, match="no deleted volume"):
            await asks.forget_deleted("acme", UUID)
        assert await signing(service).sign("get", [BLOCK])
        async with connected(service) as client:
            assert (await client.admin.status()).format.uuid == UUID
        await asks.delete_volume("acme/v1")
        assert len(await asks.deleted_volumes("acme", "v1")) == 1


async def test_what_an_end_in_the_middle_of_forgetting_has_left_is_dropped() -> None:
    async with serving() as service:
        asks = managing(service)
        form = await asks.delete_volume("acme/v1")
        await BucketKeys(service.store, None).forget(form)
        assert await asks.deleted_volumes("acme", "v1") == []
        assert await service.store.settings("deleted/") == {}


async def test_a_tenant_stays_and_the_uuid_is_taken_while_objects_are_left() -> None:
    async with serving() as service:
        asks = managing(service)
        async with connected(service) as client:
            dumped = b"".join([part.data async for part in client.admin.dump()])
        form = await asks.delete_volume("acme/v1")
        with pytest.raises(FsError, match="atoll delete --resume") as refused:
            await asks.delete_tenant("acme")
        assert refused.value.errno == errno.ENOTEMPTY
        with pytest.raises(VolumeExists, match="atoll delete --resume"):
            await create_volume(service.endpoint(), replace(form, name="v9"), uid=0, gid=0, mode=0o755)
        with pytest.raises(VolumeExists, match="atoll delete --resume"):
            await load(service, dumped)
        # Another one of that name may be made, and both are told apart.
        await create_volume(service.endpoint(), replace(form, uuid=OTHER), uid=0, gid=0, mode=0o755)
        assert [each.uuid for each in await asks.deleted_volumes("acme", "v1")] == [UUID]
        assert await signing(service, deleted_uuid=UUID).sign("delete", [BLOCK])
        with pytest.raises(FsError):
            await signing(service, deleted_uuid=OTHER).sign("delete", [f"{OTHER}/0/1.0"])
        await asks.forget_deleted("acme", UUID)
        await load(service, dumped)
        for name in ("v1", "v9"):
            await asks.delete_volume(f"acme/{name}")
        await asks.delete_tenant("acme")


async def load(service: Served, dumped: bytes) -> None:
    loaded, _ = await load_volume(
        service.endpoint(), "acme/v9", stream([dumped]), bucket_url=None, told=lambda *_: None
    )
    assert loaded.uuid == UUID


async def test_volumes_whose_urls_are_not_signed_are_not_remembered() -> None:
    elsewhere = replace(form_of(2), bucket_url="gs://bucket")
    async with serving(form_of(1), elsewhere, keys=False) as service:
        kept = BucketKeys(service.store, MasterKeys([OLD]))
        await kept.put(elsewhere, {"GOOGLE_SERVICE_ACCOUNT_KEY": "{}"})
        for name in ("v1", "v2"):
            await managing(service).delete_volume(f"acme/{name}")
            assert await managing(service).deleted_volumes("acme", name) == []
        assert await service.store.settings("keys/") == {}
        assert await service.store.settings("deleted/") == {}


async def test_keys_of_deleted_volumes_are_rotated_and_those_that_cannot_be_read_can_be_forgotten() -> None:
    async with serving() as service:
        form = await managing(service).delete_volume("acme/v1")
        assert await BucketKeys(service.store, MasterKeys([NEW, OLD])).rotate() == 1
        assert await BucketKeys(service.store, MasterKeys([NEW])).of(form) == KEYS
        # This process knows the old one only.
        with pytest.raises(AtollError) as locked:
            await signing(service, deleted_uuid=UUID).sign("delete", [BLOCK])
        assert locked.value.errno == KeysLocked.errno
        assert len(await managing(service).deleted_volumes("acme", "v1")) == 1
        await managing(service).forget_deleted("acme", UUID)
        assert await service.store.settings("keys/") == {}
