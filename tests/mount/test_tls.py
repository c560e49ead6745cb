"""Services by TLS, as processes: a mount and commands by atolls://, several processes, and certificates that are replaced."""

from __future__ import annotations

import json
import socket
import ssl
import time
from pathlib import Path

from client.volume import TOKEN_VARIABLE
from metasvc.api.server import owner_of
from tests.mount.mounted import COMMAND_TIMEOUT_S, MountedVolume, atoll
from tests.mount.service import ServiceProcess, mounted_from, service, services
from tests.servers.certificates import Authority
from tests.servers.ports import HOST


def shown_serial(running: ServiceProcess, authority: Authority) -> str:
    context = ssl.create_default_context(cafile=str(authority.ca))
    with (
        socket.create_connection((HOST, running.port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=HOST) as connection,
    ):
        found = connection.getpeercert()
    assert found is not None
    return str(found["serialNumber"])


def bucket_of(directory: Path) -> str:
    (directory / "bucket").mkdir()
    return f"file://{directory}/bucket"


def work(volume: MountedVolume) -> None:
    data = bytes(range(256)) * (5 << 12)
    (volume.path / "directory").mkdir()
    (volume.path / "directory" / "file").write_bytes(data)
    assert (volume.path / "directory" / "file").read_bytes() == data


def test_a_mount_works_by_tls_and_the_certificate_is_replaced_under_it(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue(HOST)
    environment = {"ATOLL_TLS_CA": str(authority.ca)}
    with service(tmp_path, options=pair.options) as running:
        with mounted_from(running, tmp_path, "--bucket", bucket_of(tmp_path), environment=environment) as volume:
            assert volume.address.startswith("atolls://")
            work(volume)
            before = shown_serial(running, authority)
            authority.issue(HOST, to=pair)
            deadline = time.monotonic() + COMMAND_TIMEOUT_S
            while shown_serial(running, authority) == before:
                assert time.monotonic() < deadline, "the certificate was not read again"
                time.sleep(0.1)
            assert (volume.path / "directory" / "file").stat().st_size == 5 << 20
            assert volume.document("fsck", volume.address)["clean"]
        told = atoll("status", running.address(), environment={TOKEN_VARIABLE: running.token})
        assert told.returncode == 1
        assert "--tls-ca" in told.stderr
        plain = running.address().replace("atolls://", "atoll://")
        told = atoll("status", plain, environment={TOKEN_VARIABLE: running.token})
        assert told.returncode == 1
        listed = atoll(
            "tenant", "list", f"atolls://{HOST}:{running.port}", "--tls-ca", str(authority.ca),
            environment={TOKEN_VARIABLE: running.token},
        )  # fmt: skip
        assert (listed.returncode, "acme" in listed.stdout) == (0, True), listed


def test_processes_hand_volumes_to_each_other_and_send_clients_on_by_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue(HOST)
    environment = {"ATOLL_TLS_CA": str(authority.ca)}
    store = f"sqlite:///{tmp_path}/shared.db"
    bucket = bucket_of(tmp_path)
    with services(tmp_path, store, count=2, options=pair.options, environment=environment) as processes:
        given = {**environment, TOKEN_VARIABLE: processes[0].token}
        processes[1].kill()
        addresses = [processes[0].address(f"v{number}") for number in range(4)]
        for address in addresses:
            made = atoll(
                "format", address, "--bucket", f"{bucket}/{address[-2:]}", "--create-bucket", environment=given
            )
            assert made.returncode == 0, made
        processes[1].start()
        deadline = time.monotonic() + COMMAND_TIMEOUT_S
        while True:
            owners = set()
            for address in addresses:
                alone = address.replace(f",{HOST}:{processes[1].port}", "")
                asked = atoll("status", alone, "--json", environment=given)
                assert asked.returncode == 0, asked
                owners.add(owner_of(json.loads(asked.stdout)["owner"]))
            if len(owners) == 2:
                break
            assert time.monotonic() < deadline, "no volume was handed over"


def test_other_machines_are_answered_by_tls_or_with_a_word_that_they_are_trusted(tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path}/service.db"
    refused = atoll("serve", "--store", store, "--listen", "0.0.0.0:9410")
    assert refused.returncode == 2
    assert "--tls-cert" in refused.stderr
    half = atoll("serve", "--store", store, "--listen", "127.0.0.1:9410", "--tls-cert", str(tmp_path / "c"))
    assert half.returncode == 2
    assert "--tls-key" in half.stderr
    told = atoll("status", "atoll://192.0.2.1:9410/acme/v", environment={TOKEN_VARIABLE: "token"})
    assert told.returncode == 1
    assert "atolls://" in told.stderr
