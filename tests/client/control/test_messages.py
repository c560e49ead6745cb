"""The language of the control socket: what is written is read again, and whatever else comes is refused."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkstore.errors import AtollError, ObjectMissing
from client.control.messages import (
    MAX_REQUEST_BYTES,
    ControlError,
    Items,
    Progress,
    RemoteError,
    Request,
    Result,
    decode_reply,
    decode_request,
    encode_error,
    encode_items,
    encode_progress,
    encode_request,
    encode_result,
    internal_error,
    name_of,
    text_of,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=4), JSON, max_size=4)


@given(name=st.text(max_size=10), params=OBJECTS)
def test_a_request_is_read_as_it_was_written_and_is_one_line(name: str, params: dict[str, Any]) -> None:
    line = encode_request(Request(name, params))
    assert line.count(b"\n") == 1
    assert decode_request(line) == Request(name, params)


@given(st.binary(max_size=60))
def test_every_file_name_passes_through_json_unchanged(name: bytes) -> None:
    assert name_of(json.loads(json.dumps(text_of(name)))) == name


def test_surrogates_that_stand_for_no_byte_are_refused() -> None:
    with pytest.raises(ControlError):
        name_of("\ud800")


@given(
    text=st.text(max_size=9),
    done=st.integers(0),
    total=st.none() | st.integers(0),
    rows=st.lists(JSON, max_size=3),
    value=OBJECTS,
)
def test_replies_are_read_as_they_were_written(
    text: str, done: int, total: int | None, rows: list[Any], value: dict[str, Any]
) -> None:
    progress = Progress(text, done, total, "objects")
    assert decode_reply(encode_progress(progress)) == progress
    assert decode_reply(encode_items(Items("problems", rows))) == Items("problems", rows)
    assert decode_reply(encode_result(value)) == Result(value)


def test_an_error_keeps_its_code_errno_and_whether_a_repeat_helps() -> None:
    error = ObjectMissing("no object 1/2/3.0")
    read = decode_reply(encode_error(error))
    assert isinstance(read, RemoteError)
    assert (read.code, read.errno, read.message, read.retryable) == (
        error.code,
        error.errno,
        error.message,
        error.retryable,
    )
    long = decode_reply(encode_error(AtollError("x" * (8 << 20))))
    assert isinstance(long, RemoteError)
    assert len(long.message) == 8192


MALFORMED = [
    b"",
    b"\n",
    b"{}\n",
    b"[]\n",
    b"null\n",
    b"not json\n",
    b"\xff\xfe\n",
    b"[" * 60_000 + b"\n",
    b'{"version":1,"request":"gc","params":{}}',
    b'{"version":2,"request":"gc","params":{}}\n',
    b'{"version":true,"request":"gc","params":{}}\n',
    b'{"version":1,"request":7,"params":{}}\n',
    b'{"version":1,"request":"gc","params":[]}\n',
    b'{"version":1,"request":"gc"}\n',
    b'{"version":1,"request":"gc","params":{},"more":1}\n',
    b'{"version":1,"request":"gc","params":{"a":' + b"9" * 5000 + b"}}\n",
    b'{"version":1,"request":"' + b"x" * MAX_REQUEST_BYTES + b'","params":{}}\n',
]


@pytest.mark.parametrize("line", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_requests_are_refused(line: bytes) -> None:
    with pytest.raises(ControlError):
        decode_request(line)


@pytest.mark.parametrize(
    "line",
    [
        *MALFORMED[:7],
        b'{"version":1}\n',
        b'{"version":1,"result":7}\n',
        b'{"version":1,"items":{"a":[],"b":[]}}\n',
        b'{"version":1,"items":{"a":{}}}\n',
        b'{"version":1,"progress":{}}\n',
        b'{"version":1,"progress":{"text":"a","done":"1","total":null,"unit":""}}\n',
        b'{"version":1,"error":{"code":"x"}}\n',
        b'{"version":1,"other":{}}\n',
    ],
)
def test_malformed_replies_are_refused(line: bytes) -> None:
    with pytest.raises(ControlError):
        decode_reply(line)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(line: bytes) -> None:
    for decode in (decode_request, decode_reply):
        with suppress(ControlError):
            decode(line)


def test_messages_that_are_too_long_are_not_sent() -> None:
    with pytest.raises(ControlError):
        encode_request(Request("gc", {"x": "y" * MAX_REQUEST_BYTES}))
    with pytest.raises(ControlError):
        encode_result({"x": "y" * (5 << 20)})


def test_an_unexpected_exception_becomes_one_line() -> None:
    assert "\n" not in str(internal_error(ValueError("a\nb")))
    assert internal_error(FileNotFoundError(2, "No such file or directory", "/x")).errno == 2
