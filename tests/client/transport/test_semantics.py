"""Every example of docs/semantics.md, run on a real mount."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.mounted import MountedVolume, mounted

_PAGE = Path(__file__).parents[3] / "docs" / "semantics.md"
_EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def examples() -> list[tuple[int, str]]:
    """Return the examples of the page with the line at which each begins."""
    text = _PAGE.read_text()
    return [(text[: match.start(1)].count("\n") + 1, match[1]) for match in _EXAMPLE.finditer(text)]


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountedVolume]:
    """Yield one mount for all examples: each has a directory of its own."""
    with mounted(tmp_path_factory.mktemp("semantics")) as mount:
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
