"""URLs: where the volume ends and the path begins."""

from __future__ import annotations

import errno

import fsspec  # type: ignore[import-untyped]
import pytest

from atollfs import AtollFileSystem
from atollfs.location import split_url


@pytest.mark.parametrize(
    ("url", "address", "path"),
    [
        ("atoll://h:1/t/v/a/b", "atoll://h:1/t/v", "/a/b"),
        ("atoll://h:1/t/v/", "atoll://h:1/t/v", "/"),
        ("atoll://h:1/t/v", "atoll://h:1/t/v", "/"),
        ("atoll://[::1]:7070/t/v//a/", "atoll://[::1]:7070/t/v", "/a"),
        ("atoll:///a/b", None, "/a/b"),
        ("atoll://", None, "/"),
        ("/a/./b/../c/", None, "/a/c"),
        ("a", None, "/a"),
        ("", None, "/"),
        ("/..", None, "/"),
        ("/\udcff", None, "/\udcff"),
    ],
)
def test_a_url_is_an_address_and_a_path(url: str, address: str | None, path: str) -> None:
    assert split_url(url) == (address, path)
    assert AtollFileSystem._strip_protocol(url) == path
    assert AtollFileSystem._get_kwargs_from_urls(url) == ({} if address is None else {"address": address})


@pytest.mark.parametrize("url", ["atoll://host/t/v/a", "atoll://h:1/t", "atoll://h:0/t/v/a", "atoll://relative"])
def test_a_url_that_lacks_a_part_is_refused_with_what_is_expected(url: str) -> None:
    with pytest.raises(OSError, match="atoll://HOST:PORT/TENANT/VOLUME") as refused:
        split_url(url)
    assert refused.value.errno == errno.EINVAL


def test_a_path_with_a_nul_byte_or_of_more_than_4095_bytes_is_refused() -> None:
    with pytest.raises(OSError, match="NUL") as refused:
        split_url("/a\0b")
    assert refused.value.errno == errno.EINVAL
    with pytest.raises(OSError, match="4095") as refused:
        split_url("/a" * 3000)
    assert refused.value.errno == errno.ENAMETOOLONG


def test_fsspec_finds_the_file_system_by_its_entry_point_and_opens_nothing() -> None:
    fs, path = fsspec.url_to_fs("atoll://127.0.0.1:1/t/v/dir/file", token="none")
    assert isinstance(fs, AtollFileSystem)
    assert path == "/dir/file"
    assert fs.unstrip_protocol(path) == "atoll://127.0.0.1:1/t/v/dir/file"
    assert fsspec.url_to_fs(fs.unstrip_protocol(path), token="none") == (fs, path)


def test_a_file_system_without_a_volume_says_how_to_name_one() -> None:
    with pytest.raises(ValueError, match="address="):
        fsspec.filesystem("atoll")


def test_equal_options_are_one_instance() -> None:
    one = fsspec.filesystem("atoll", address="/some/volume")
    assert fsspec.filesystem("atoll", address="/some/volume") is one
    assert fsspec.filesystem("atoll", address="/other/volume") is not one
    assert one.unstrip_protocol("/a") == "atoll:///a"
