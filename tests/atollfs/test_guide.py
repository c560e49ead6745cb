"""Every example of docs/guides/python.md, run on an embedded volume and on a service's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import fsspec.config  # type: ignore[import-untyped]
import pytest

from atollfs import AtollFileSystem
from tests.atollfs.places import embedded_place, service_place
from tests.mount.service import ServiceProcess

_PAGE = Path(__file__).parents[2] / "docs" / "guides" / "python.md"
_EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("kind", ["embedded", "service"])
def test_the_examples_of_the_page_do_what_they_say(
    kind: str, tmp_path: Path, running_service: ServiceProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = embedded_place(tmp_path) if kind == "embedded" else service_place(running_service, tmp_path)
    monkeypatch.setenv("ATOLL_TOKEN", running_service.token)
    monkeypatch.setitem(fsspec.config.conf, "atoll", {"cache_dir": str(tmp_path / "cache")})
    text = _PAGE.read_text()
    examples = list(_EXAMPLE.finditer(text))
    assert len(examples) >= 3
    try:
        for example in examples:
            line = text[: example.start(1)].count("\n")
            names: dict[str, Any] = {"address": place.options["address"]}
            # Padded, so that a failing assertion is reported with its line in the page.
            exec(compile("\n" * line + example[1], str(_PAGE), "exec"), names)
    finally:
        for fs in list(AtollFileSystem._cache.values()):
            fs.close()
        AtollFileSystem.clear_instance_cache()


def test_the_page_names_every_option() -> None:
    table = _PAGE.read_text()
    options = AtollFileSystem.__init__.__annotations__.keys() - {"return", "storage_options"}
    assert [option for option in options if f"`{option}`" not in table] == []
