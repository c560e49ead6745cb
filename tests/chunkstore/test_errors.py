"""The error family: each leaf has an errno, a stable code, and a text of one line."""

from __future__ import annotations

import errno
import re

import pytest

import chunkstore.errors
from chunkstore.errors import AtollError, BucketUnavailable, ObjectCorrupt


def _family(kind: type[AtollError]) -> list[type[AtollError]]:
    ours = [child for child in kind.__subclasses__() if child.__module__ == chunkstore.errors.__name__]
    return [kind, *(leaf for child in ours for leaf in _family(child))]


@pytest.mark.parametrize("kind", _family(AtollError)[1:])
def test_a_leaf_is_drawn_in_the_tree_with_its_errno_and_code(kind: type[AtollError]) -> None:
    drawn = re.search(rf"── {kind.__name__} +(\w+) +([a-z-]+) ", chunkstore.errors.__doc__ or "")
    assert drawn is not None
    assert (drawn[1], drawn[2]) == (errno.errorcode[kind.errno], kind.code)


def test_codes_are_unique() -> None:
    codes = [kind.code for kind in _family(AtollError)]
    assert len(codes) == len(set(codes))


def test_only_an_unavailable_bucket_is_worth_a_retry() -> None:
    assert [kind for kind in _family(AtollError) if kind.retryable] == [BucketUnavailable]


def test_the_text_of_an_error_is_one_line() -> None:
    error = ObjectCorrupt("first\nsecond\r\n  third")
    assert str(error) == error.message == "first second third"
    assert error.args == ("first second third",)


def test_an_instance_may_narrow_errno_and_retryable() -> None:
    error = BucketUnavailable("x", errno=errno.ETIMEDOUT, retryable=False)
    assert (error.errno, error.retryable) == (errno.ETIMEDOUT, False)
    assert (BucketUnavailable("x").errno, BucketUnavailable.retryable) == (errno.EIO, True)
