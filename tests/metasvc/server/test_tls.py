"""The service by TLS: who is believed, that nothing is sent to anybody else, and how certificates are replaced."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from client.meta.encryption import CaInvalid, Trust, allows_plain
from client.meta.endpoint import Endpoint, ServiceRefused, ServiceUnavailable, Untrusted
from metasvc.api import atoll_pb2 as pb
from metasvc.api.server import Server
from metasvc.model import ROOT_INO
from metasvc.server.certificate import Certificate, CertificateInvalid
from metasvc.server.tokens import prepare
from metasvc.store.memory import MemoryStore
from tests.metasvc.engine.volumes import ROOT, format_volume
from tests.metasvc.server.served import Cutter, Served, connected, served
from tests.servers.certificates import Authority, Pair
from tests.servers.ports import free_ports


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def certificate(pair: Pair) -> Certificate:
    return Certificate(str(pair.cert), str(pair.key))


@asynccontextmanager
async def encrypted(authority: Authority, *hosts: str) -> AsyncIterator[Served]:
    store = MemoryStore()
    await (await format_volume(store, tenant="acme", name="v")).close()
    shown = certificate(authority.issue(*hosts or ("127.0.0.1", "localhost")))
    async with served(store, name="acme/v", certificate=shown, trust=Trust(str(authority.ca))) as service:
        yield service


async def list_volumes(endpoint: Endpoint) -> int:
    data = await endpoint.ask(pb.Opening.LIST_VOLUMES, pb.ListVolumesRequest().SerializeToString())
    return len(pb.ListVolumesReply.FromString(data).formats)


async def test_a_session_works_and_survives_a_cut_of_its_connection(authority: Authority) -> None:
    async with encrypted(authority) as service, Cutter(service.port) as cutter:
        async with connected(service, port=cutter.port) as client:
            made = await client.meta.mkdir(ROOT, ROOT_INO, b"before", mode=0o755)
            cutter.cut()
            assert (await client.meta.mkdir(ROOT, made.ino, b"after", mode=0o755)).ino
            # Longer than a record, both ways.
            value = bytes(range(256)) * 200
            await client.meta.setxattr(ROOT, made.ino, b"user.much", value, flags=0)
            assert await client.meta.getxattr(made.ino, b"user.much") == value
        assert await list_volumes(service.endpoint()) == 1


async def test_nothing_passes_readably(authority: Authority) -> None:
    async with encrypted(authority) as service:
        seen = bytearray()

        async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, back = await asyncio.open_connection("127.0.0.1", service.port)

            async def relay(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
                while data := await source.read(65536):
                    seen.extend(data)
                    target.write(data)
                target.close()

            await asyncio.gather(relay(reader, back), relay(there, writer), return_exceptions=True)

        between = await asyncio.start_server(listen, "127.0.0.1", 0)
        port = between.sockets[0].getsockname()[1]
        try:
            assert await list_volumes(service.endpoint(port=port)) == 1
        finally:
            between.close()
        assert len(seen) > 1000
        assert service.token.encode() not in seen
        assert b"acme" not in seen


async def test_whom_no_known_authority_certifies_gets_no_token(authority: Authority, tmp_path: Path) -> None:
    async with encrypted(authority) as service:
        other = Authority(tmp_path, "somebody")
        servers = [Server("127.0.0.1", service.port)]
        for trust in (Trust(None), Trust(str(other.ca))):
            with pytest.raises(Untrusted, match="--tls-ca"):
                await list_volumes(Endpoint(servers, service.token, trust=trust))


async def test_a_certificate_for_another_host_is_refused(authority: Authority) -> None:
    async with encrypted(authority, "meta.example.org", "192.0.2.1") as service:
        with pytest.raises(Untrusted, match=r"127\.0\.0\.1"):
            await list_volumes(service.endpoint())
    async with encrypted(authority, "localhost") as service:
        named = Endpoint([Server("localhost", service.port)], service.token, trust=Trust(str(authority.ca)))
        assert await list_volumes(named) == 1


async def test_a_certificate_whose_time_is_over_is_refused(authority: Authority) -> None:
    store = MemoryStore()
    old = certificate(authority.issue("127.0.0.1", days=-1))
    async with served(store, certificate=old, trust=Trust(str(authority.ca))) as service:
        with pytest.raises(Untrusted, match="expired"):
            await list_volumes(service.endpoint())


async def test_plain_text_at_a_service_with_tls_and_the_other_way_say_so(authority: Authority) -> None:
    async with encrypted(authority) as service:
        plain = Endpoint([Server("127.0.0.1", service.port)], service.token)
        with pytest.raises((ServiceRefused, ServiceUnavailable)):
            await list_volumes(plain)
    async with served(MemoryStore()) as service:
        by_tls = Endpoint([Server("127.0.0.1", service.port)], service.token, trust=Trust(str(authority.ca)))
        with pytest.raises(Untrusted, match="atoll://"):
            await list_volumes(by_tls)


async def test_plain_text_goes_to_this_machine_only_unless_allowed() -> None:
    [port] = free_ports(1)
    for host in ("192.0.2.1", "meta.example.org", "0.0.0.0"):
        with pytest.raises(Untrusted, match="atolls://"):
            await list_volumes(Endpoint([Server(host, port)], "token"))
    for host in ("127.0.0.1", "localhost", "[::1]"):
        with pytest.raises(ServiceUnavailable):
            await list_volumes(Endpoint([Server(host, port)], "token"))
    assert not allows_plain({})
    assert not allows_plain({"ATOLL_INSECURE": "0"})
    assert allows_plain({"ATOLL_INSECURE": "1"})


async def test_a_client_is_sent_to_the_owner_by_tls_and_believes_no_other_there(
    authority: Authority, tmp_path: Path
) -> None:
    store = MemoryStore()
    await (await format_volume(store, tenant="acme", name="v")).close()
    token = await prepare(store)
    trust = Trust(str(authority.ca))
    first = Served(store, "acme/v", token, {}, certificate=certificate(authority.issue("127.0.0.1")), trust=trust)
    pair = Authority(tmp_path, "somebody").issue("127.0.0.1")
    second = Served(store, "acme/v", token, {}, certificate=certificate(pair), trust=trust)
    try:
        for each in (first, second):
            await each.start()
        await second.volume()
        request = pb.AdminRequest(status=pb.Nothing()).SerializeToString()
        with pytest.raises(Untrusted, match=str(second.port)):
            await first.endpoint().ask(pb.Opening.ADMINISTER, request, volume="acme/v")
        authority.issue("127.0.0.1", to=pair)
        second.certificate.look()  # type: ignore[union-attr]
        asked = first.endpoint()
        await asked.ask(pb.Opening.ADMINISTER, request, volume="acme/v")
        assert str(asked) == f"127.0.0.1:{second.port}"
    finally:
        for each in (first, second):
            await each.stop()


async def test_a_certificate_that_was_replaced_is_shown_to_who_comes_later(
    authority: Authority, tmp_path: Path
) -> None:
    store = MemoryStore()
    pair = authority.issue("127.0.0.1")
    shown = certificate(pair)
    async with served(store, certificate=shown, trust=Trust(str(authority.ca))) as service:
        before = await _serial(service, authority)
        shown.look()
        assert shown.readings == 1
        authority.issue("127.0.0.1", to=pair)
        assert await _serial(service, authority) == before
        shown.look()
        after = await _serial(service, authority)
        assert after != before
        # Half of the next one is there: what is whole stays.
        other = authority.issue("127.0.0.1")
        other.cert.replace(pair.cert)
        shown.look()
        assert await _serial(service, authority) == after
        other.key.replace(pair.key)
        shown.look()
        assert await _serial(service, authority) not in (before, after)
        readings = shown.readings
        shown.look(is_asked=True)
        assert shown.readings == readings + 1


async def _serial(service: Served, authority: Authority) -> str:
    context = ssl.create_default_context(cafile=str(authority.ca))
    _, writer = await asyncio.open_connection("127.0.0.1", service.port, ssl=context)
    try:
        found = writer.get_extra_info("peercert")
        return str(found["serialNumber"])
    finally:
        writer.transport.abort()


async def test_a_session_goes_on_when_the_certificate_is_bad_for_a_while(authority: Authority, tmp_path: Path) -> None:
    async with encrypted(authority) as service, connected(service) as client:
        await client.meta.mkdir(ROOT, ROOT_INO, b"before", mode=0o755)
        good = service.certificate
        await service.stop()
        service.certificate = certificate(Authority(tmp_path, "somebody").issue("127.0.0.1"))
        await service.start()
        making = asyncio.create_task(client.meta.mkdir(ROOT, ROOT_INO, b"after", mode=0o755))
        async with asyncio.timeout(30):
            while not isinstance(client.connection._failure, ServiceUnavailable) or "accepted" not in str(
                client.connection._failure
            ):
                await asyncio.sleep(0.01)
        await service.stop()
        service.certificate = good
        await service.start()
        assert (await making).ino


def test_authorities_are_read_again_when_their_file_is_replaced(authority: Authority, tmp_path: Path) -> None:
    trust = Trust(str(authority.ca))
    before = trust.context()
    assert trust.context() is before
    other = Authority(tmp_path, "somebody")
    other.ca.replace(authority.ca)
    after = trust.context()
    assert after is not before
    authority.ca.unlink()
    assert trust.context() is after


@pytest.mark.parametrize("text", [None, "", "no certificate"])
def test_what_is_no_file_of_authorities_is_told_with_the_remedy(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CaInvalid, match="--tls-ca") as refused:
        Trust(str(path))
    assert "\n" not in str(refused.value)


def test_what_is_no_certificate_is_told_with_the_remedy(authority: Authority, tmp_path: Path) -> None:
    one, other = authority.issue("a"), authority.issue("b")
    nothing = tmp_path / "nothing"
    nothing.write_text("")
    for cert, key in ((one.cert, other.key), (nothing, one.key), (one.cert, tmp_path / "absent")):
        with pytest.raises(CertificateInvalid, match="--tls-cert") as refused:
            Certificate(str(cert), str(key))
        assert "\n" not in str(refused.value)


async def test_who_connects_and_says_no_hello_of_tls_holds_up_nobody(authority: Authority) -> None:
    async with encrypted(authority) as service:
        idle = [await asyncio.open_connection("127.0.0.1", service.port) for _ in range(20)]
        try:
            for _, writer in idle[:10]:
                writer.write(b"atollfs\x01 and then something else")
            async with connected(service) as client:
                assert (await client.meta.statfs(ROOT_INO)).used_inodes
        finally:
            for _, writer in idle:
                writer.transport.abort()


async def test_who_does_not_speak_tls_is_told_once_in_the_log_and_others_are_served(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    async with encrypted(authority) as service:
        for sent in (b"GET / HTTP/1.1\r\n\r\n" * 10, b"\x16\x03\x01\x00\x05damaged", b""):
            reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
            writer.write(sent)
            if not sent:
                writer.close()
            async with asyncio.timeout(20):
                await reader.read()
            writer.close()
        assert await list_volumes(service.endpoint()) == 1
        assert caplog.text.count("a connection by TLS does not begin") == 1


async def test_a_service_ends_within_a_handshake(authority: Authority) -> None:
    async with encrypted(authority) as service:
        assert service.service is not None
        reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
        writer.write(b"\x16\x03\x01")
        await asyncio.sleep(0.05)
        async with asyncio.timeout(8):
            await service.stop()
            assert await reader.read() == b""
        writer.close()
