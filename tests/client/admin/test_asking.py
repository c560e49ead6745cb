"""Parameters of requests: what is not exactly what an operation takes is refused before anything is done."""

from __future__ import annotations

import asyncio
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkstore.errors import AtollError
from client.address import normalize
from client.admin.asking import Params, Target
from client.admin.operations import OPERATIONS, run_operation
from client.control.endpoint import Peer
from client.control.messages import ControlError, Items, Progress, Request
from tests.client.cli.commands import done
from tests.client.volumes import opened

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
PATHS = st.binary(max_size=30).filter(lambda path: b"\0" not in path)


@given(target=st.builds(Target, PATHS.map(normalize), in_mount=st.booleans(), follow=st.booleans()))
def test_a_target_is_read_as_it_was_sent(target: Target) -> None:
    assert Params({"target": target.as_json()}).target("target") == target


@pytest.mark.parametrize(
    ("method", "value"),
    [
        ("flag", 1),
        ("flag", "yes"),
        ("integer", True),
        ("integer", -1),
        ("integer", 1.0),
        ("integer", 1 << 63),
        ("number", True),
        ("number", -0.5),
        ("number", float("inf")),
        ("number", float("nan")),
        ("name", None),
        ("name", ""),
        ("name", "a/b"),
        ("name", ".."),
        ("name", "a\0"),
        ("name", "\ud800"),
        ("target", "path"),
        ("target", {}),
        ("target", {"path": "/a", "more": 1}),
        ("target", {"path": "/a", "in_mount": 1}),
        ("integers", 7),
        ("integers", [1, True]),
        ("integers", [-1]),
    ],
)
def test_values_of_another_type_or_range_are_refused(method: str, value: Any) -> None:
    with pytest.raises(ControlError):
        getattr(Params({"x": value}), method)("x")


def test_a_parameter_that_nobody_takes_is_refused() -> None:
    params = Params({"dry_run": True, "drY_run": True})
    assert params.flag("dry_run")
    with pytest.raises(ControlError, match="drY_run"):
        params.done()


class Silent:
    """A report that nobody reads."""

    def progress(self, progress: Progress) -> None:
        pass

    async def items(self, items: Items) -> None:
        pass


def test_any_parameters_are_an_answer_or_an_error_of_one_line(tmp_path: Path) -> None:
    """Random parameters to every operation on a real volume; afterwards it is still whole."""
    done("format", tmp_path / "volume")
    shutil.copytree(tmp_path / "volume", tmp_path / "copy")
    names = ["dry_run", "repair", "data", "target", "source", "capacity_bytes", "trash_ids", "older_than_s", "x"]
    requests: list[Request] = []

    @given(
        name=st.sampled_from([*OPERATIONS, "", "nope"]),
        params=st.dictionaries(st.sampled_from(names), JSON, max_size=3),
    )
    def collect(name: str, params: dict[str, Any]) -> None:
        requests.append(Request(name, params))

    collect()

    async def ask_all() -> None:
        async with opened(tmp_path / "copy", tmp_path / "cache") as volume:
            for request in requests:
                # Nothing else may come out: every other exception is a bug, and fails this test.
                with suppress(AtollError):
                    await run_operation(volume.volume, request, Peer(1, os.geteuid(), 0), Silent())
            assert [problem async for problem in volume.volume.admin.check(repair=False)] == []

    asyncio.run(ask_all())
