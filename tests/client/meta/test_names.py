"""What a session may say of absent names: nothing without a lease, and never that a name is absent which is there."""

from __future__ import annotations

import pytest

from client.meta import names as naming
from client.meta.names import KnownNames
from metasvc.model import Ino
from tests.client.meta.test_recent import Clock

A, B, TOP = Ino(10), Ino(11), Ino(1)
LEASE_S = 0.9


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def names(clock: Clock) -> KnownNames:
    """Know the directory A, made a moment ago."""
    known = KnownNames(now_s=clock)
    known.told(known.asked(), [A], lease_s=LEASE_S, changed=[TOP], made=A)
    return known


def test_a_new_directory_has_no_names_but_those_that_were_added(names: KnownNames) -> None:
    assert names.is_absent(A, b"n")
    assert not names.is_absent(B, b"n"), "nobody said so"
    names.adding(A, b"n")
    assert not names.is_absent(A, b"n"), "before the request is sent, whatever becomes of it"
    assert names.is_absent(A, b"m")
    assert not names.is_absent(A, b"x" * 256), "what is too long has an error of its own"


def test_a_lease_counts_from_before_the_request_that_extended_it(names: KnownNames, clock: Clock) -> None:
    clock.now_s += 0.5
    asked = names.asked()
    clock.now_s += 0.3
    names.told(asked, [A], lease_s=LEASE_S, changed=[A])
    clock.now_s += 0.5
    assert names.is_absent(A, b"n")
    clock.now_s += 0.2
    assert not names.is_absent(A, b"n")
    names.adding(A, b"n")
    asked = names.asked()
    names.told(asked, [A], lease_s=LEASE_S, changed=[A])
    assert names.is_absent(A, b"m"), "the service has kept it: nobody else was there"
    assert not names.is_absent(A, b"n")
    names.told(asked._replace(at_s=0), [A], lease_s=LEASE_S, changed=[A])
    assert names.is_absent(A, b"m"), "an older reply shortens nothing"


@pytest.mark.parametrize("how", ["recall", "reply", "all"])
def test_what_has_ended_does_not_come_back(names: KnownNames, how: str) -> None:
    asked = names.asked()
    if how == "recall":
        names.recalled(A)
    elif how == "all":
        names.clear()
    else:
        names.told(asked, [], lease_s=LEASE_S, changed=[A])
    names.told(asked, [A], lease_s=LEASE_S, changed=[A])
    assert not names.is_absent(A, b"n")


def test_a_directory_in_which_names_were_added_before_the_reply_that_made_it_is_not_known(clock: Clock) -> None:
    known = KnownNames(now_s=clock)
    asked = known.asked()
    known.adding(TOP, b"a")
    known.adding(A, b"n")
    known.told(asked, [A], lease_s=LEASE_S, changed=[TOP], made=A)
    assert not known.is_absent(A, b"n")
    assert not known.is_absent(A, b"m")


def test_nor_is_one_of_which_that_may_have_been_forgotten(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naming, "_MAX_STRANGE", 3)
    known = KnownNames(now_s=clock)
    asked = known.asked()
    for number in range(4):
        known.adding(Ino(100 + number), b"n")
    known.told(asked, [Ino(100)], lease_s=LEASE_S, changed=[TOP], made=Ino(100))
    assert not known.is_absent(Ino(100), b"n")


def test_too_many_names_are_all_forgotten(names: KnownNames, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naming, "MAX_NAMES", 4)
    for number in range(3):
        names.adding(A, b"%d" % number)
    assert names.is_absent(A, b"n")
    names.adding(A, b"3")
    assert not names.is_absent(A, b"n")
    assert not names._count
    names.told(names.asked(), [A], lease_s=LEASE_S, changed=[A])
    assert not names.is_absent(A, b"n")
