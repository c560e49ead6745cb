"""Addresses as users type them: the grammar of ADDRESS and ADDRESS:/path."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.address import (
    AddressInvalid,
    EmbeddedAddress,
    ServiceAddress,
    VolumePath,
    components,
    normalize,
    parse_address,
    parse_volume_path,
    shown,
    split_path,
)
from metasvc.api.server import Server

NAMES = st.binary(min_size=1, max_size=20).filter(lambda name: b"/" not in name and b"\0" not in name)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vol", ("vol", None)),
        ("./vol:/a/b", ("./vol", "/a/b")),
        ("/srv/vol:/", ("/srv/vol", "/")),
        ("/srv/v:1/vol:/a", ("/srv/v:1/vol", "/a")),
        ("./vol:/a:/b", ("./vol:/a", "/b")),
        ("atoll://host:7000/tenant/volume", ("atoll://host:7000/tenant/volume", None)),
        ("atoll://host:7000/tenant/volume:/data", ("atoll://host:7000/tenant/volume", "/data")),
        ("s3://bucket/prefix", ("s3://bucket/prefix", None)),
        ("vol:a", ("vol:a", None)),
        (":/a", ("", "/a")),
        ("vol://", ("vol://", None)),
        ("", ("", None)),
    ],
)
def test_a_path_in_a_volume_begins_after_the_last_colon_that_no_scheme_owns(
    text: str, expected: tuple[str, str | None]
) -> None:
    assert split_path(text) == expected


@given(address=st.text(alphabet="ab:/.", max_size=12), path=st.text(alphabet="ab.", max_size=8))
def test_what_was_joined_with_a_colon_is_split_there_again(address: str, path: str) -> None:
    if address.endswith(":") or path.startswith("/"):
        return
    assert split_path(f"{address}:/{path}") == (address, f"/{path}")


def test_an_address_is_absolute_and_free_of_symbolic_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    real = os.path.realpath(tmp_path / "real" / "vol")
    assert {str(parse_address(text)) for text in ("real/vol", "./link/vol", f"{tmp_path}/link/../real/vol/")} == {real}
    assert parse_address("link/vol") == EmbeddedAddress(real)
    assert EmbeddedAddress(real).meta_db == f"{real}/meta.db"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a\0b",
        "x" * 5000,
        "atoll://127.0.0.1/tenant/volume",
        "atoll://127.0.0.1:0/tenant/volume",
        "atoll://127.0.0.1:70000/tenant/volume",
        "atoll://127.0.0.1:7000/tenant",
        "atoll://127.0.0.1:7000//volume",
        "atoll://127.0.0.1:7000/tenant/volume/more",
        "s3://bucket/prefix",
        "sqlite:///vol/meta.db",
    ],
)
def test_what_is_no_address_is_refused_in_one_line_with_the_remedy(text: str) -> None:
    with pytest.raises(AddressInvalid) as refused:
        parse_address(text)
    assert "\n" not in str(refused.value)
    assert "give" in str(refused.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "meta-0.example.org"])
def test_the_address_of_a_service_is_read_and_shown(host: str) -> None:
    text = f"atoll://{host}:7000/a-team/set_1.v2"
    assert parse_address(text) == ServiceAddress((Server(host, 7000),), "a-team", "set_1.v2")
    assert str(parse_address(text)) == text
    assert parse_volume_path(f"{text}:/a/../b") == VolumePath(parse_address(text), b"/b")


def test_a_service_of_several_processes_is_named_by_some_of_them() -> None:
    text = "atoll://meta-1:7000,[::1]:7001,meta-1:7000/a-team/v"
    address = parse_address(text)
    assert address == ServiceAddress((Server("meta-1", 7000), Server("[::1]", 7001)), "a-team", "v")
    assert str(address) == "atoll://meta-1:7000,[::1]:7001/a-team/v"
    assert parse_volume_path(f"{text}:/x") == VolumePath(address, b"/x")


@pytest.mark.parametrize("servers", ["", ",", "a:1,", "a:1,b", "a:1,b:0", "a:1,,b:2", "a:1 ,b:2"])
def test_a_list_of_processes_with_something_else_in_it_is_refused(servers: str) -> None:
    with pytest.raises(AddressInvalid):
        parse_address(f"atoll://{servers}/tenant/v")


@given(names=st.lists(NAMES, max_size=8))
def test_normalizing_keeps_the_names_of_a_path(names: list[bytes]) -> None:
    kept = [name for name in names if name not in (b".", b"..")]
    path = normalize(b"//".join([b"", *kept, b"."]) + b"/")
    assert components(path) == kept
    assert normalize(path) == path


@pytest.mark.parametrize(
    ("path", "expected"),
    [(b"", b"/"), (b"/", b"/"), (b"/..", b"/"), (b"/a/../b/./c//", b"/b/c"), (b"a/../../..", b"/")],
)
def test_dots_are_removed_and_never_lead_out_of_the_volume(path: bytes, expected: bytes) -> None:
    assert normalize(path) == expected


def test_paths_beyond_the_limit_are_refused() -> None:
    with pytest.raises(AddressInvalid) as refused:
        normalize(b"/" + b"a/" * 2048)
    assert refused.value.errno == errno.ENAMETOOLONG
    with pytest.raises(AddressInvalid):
        normalize(b"/a\0b")


def test_a_path_of_the_local_file_system_is_no_path_of_a_volume() -> None:
    assert parse_volume_path("/mnt/vol/a") is None
    parsed = parse_volume_path("/srv/vol:/a/../b")
    assert parsed is not None
    assert (str(parsed.address), parsed.path) == (os.path.realpath("/srv/vol"), b"/b")


@given(st.binary(max_size=40))
def test_a_path_in_a_message_is_printable_and_one_line(path: bytes) -> None:
    assert shown(path).isprintable()
