"""The stored form of a volume's format."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metasvc.api.volume_format import dump_format, parse_format
from metasvc.errors import SchemaTooNew, StoreError
from metasvc.model import VolumeFormat
from tests.metasvc.store.rows_of import volume_format

VERSION_1 = (
    '{"block_bytes": 4194304, "bucket_url": "s3://b/p?region=x", "capacity_bytes": 1099511627776, "compression": "zstd:1", '
    '"created_ns": 1700000000123456789, "inline_limit_bytes": 32768, "max_inodes": 0, "name": "\u00e9", "tenant": "local", '
    '"trash_days": 1, "uuid": "0190", "version": 1}'
)


@given(st.builds(VolumeFormat, trash_days=st.floats(0, 1e6), version=st.just(1)))
def test_a_format_comes_back_as_it_was(stored: VolumeFormat) -> None:
    assert parse_format(dump_format(stored)) == stored


def test_a_format_stored_by_the_first_version_is_still_read() -> None:
    stored = parse_format(VERSION_1)
    assert (stored.tenant, stored.name, stored.bucket_url) == ("local", "\u00e9", "s3://b/p?region=x")
    assert (stored.capacity_bytes, stored.trash_days) == (1 << 40, 1)


def test_a_newer_format_is_refused_naming_both_versions() -> None:
    newer = json.loads(VERSION_1) | {"version": 2, "encryption": "age"}
    with pytest.raises(SchemaTooNew, match=r"local/\u00e9 has format version 2.*up to 1.*upgrade"):
        parse_format(json.dumps(newer))


@pytest.mark.parametrize(
    "change",
    [
        {"version": None},
        {"version": "1"},
        {"name": 5},
        {"block_bytes": "4"},
        {"block_bytes": True},
        {"loading": 1},
        {"color": "red"},
    ],
    ids=repr,
)
def test_a_format_with_wrong_fields_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match="backup"):
        parse_format(json.dumps(json.loads(VERSION_1) | change))


@pytest.mark.parametrize("missing", sorted(set(json.loads(VERSION_1))))
def test_a_format_without_a_field_is_refused(missing: str) -> None:
    values = json.loads(VERSION_1)
    del values[missing]
    with pytest.raises(StoreError, match="backup"):
        parse_format(json.dumps(values))


@pytest.mark.parametrize("text", ["", "x", "[]", "1", "null", '{"version": 1'])
def test_what_is_no_format_is_refused(text: str) -> None:
    with pytest.raises(StoreError, match="backup"):
        parse_format(text)


def test_a_format_is_one_json_object_with_sorted_keys() -> None:
    assert list(json.loads(dump_format(volume_format()))) == sorted(
        VolumeFormat.__dataclass_fields__.keys() - {"loading"}
    )


def test_only_the_text_of_a_volume_that_is_being_loaded_says_so() -> None:
    # So that versions that do not know the state read all others, and refuse those.
    loading = volume_format(loading=True)
    assert json.loads(dump_format(loading))["loading"] is True
    assert parse_format(dump_format(loading)) == loading
    assert "loading" not in dump_format(volume_format())
