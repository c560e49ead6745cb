"""Every example of docs/semantics.md, run on real mounts: of an embedded volume, and of a service on each kind of server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount import stores
from tests.mount.mounted import MountedVolume, mounted
from tests.mount.service import served_and_mounted
from tests.servers.fixtures import Servers

_PAGE = Path(__file__).parents[3] / "docs" / "semantics.md"
_EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def examples() -> list[tuple[int, str]]:
    """Return the examples of the page with the line at which each begins."""
    text = _PAGE.read_text()
    return [(text[: match.start(1)].count("\n") + 1, match[1]) for match in _EXAMPLE.finditer(text)]


@pytest.fixture(scope="module", params=["embedded", "postgresql", "redis"])
def volume(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountedVolume]:
    """Yield one mount for all examples: each has a directory of its own."""
    directory = tmp_path_factory.mktemp("semantics")
    if request.param == "embedded":
        with mounted(directory) as mount:
            yield mount
        return
    url = stores.maker_of(request.param, Servers(request))(directory)
    with served_and_mounted(directory, store_url=url) as mount:
        yield mount


@pytest.mark.parametrize(
    ("line", "code"), examples(), ids=lambda value: f"line {value}" if isinstance(value, int) else ""
)
def test_an_example_of_the_page_does_what_it_says(volume: MountedVolume, line: int, code: str) -> None:
    here = volume.path / f"line{line}"
    here.mkdir()
    # Padded, so that a failing assertion is reported with its line in the page.
    exec(compile("\n" * (line - 1) + code, str(_PAGE), "exec"), {"here": here})


def test_the_page_has_examples() -> None:
    assert len(examples()) >= 10
