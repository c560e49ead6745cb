"""The guide of the commands names every command and every option that there is, and none that there is not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click

from client.cli.main import COMMANDS

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "commands.md"


def options(command: click.Command) -> Iterator[str]:
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            yield from parameter.opts
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            yield from options(inner)


def sections() -> dict[str, str]:
    """Return the text about each command."""
    found = re.split(r"^## atoll (\w+).*$", GUIDE.read_text(), flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))


def test_the_guide_has_a_section_for_every_command_and_no_other() -> None:
    assert list(sections()) == list(COMMANDS)


def test_the_guide_names_every_option_and_no_other() -> None:
    for name, text in sections().items():
        command: click.Command = import_module(f"client.cli.{name}").command
        named = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text))
        assert named == set(options(command)), name
