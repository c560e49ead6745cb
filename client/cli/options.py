"""Types and options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from client.sizes import parse_size

F = TypeVar("F", bound=Callable[..., Any])


class SizeType(click.ParamType[int]):
    """A size in bytes, as client.sizes reads it."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class DaysType(click.ParamType[float]):
    """A number of days, fractions allowed."""

    name = "days"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            days = float(value)
        except ValueError:
            days = -1.0
        if not 0 <= days <= 36_500:
            self.fail(f"{value!r} is no number of days: give 0 to 36500", param, ctx)
        return days


SIZE = SizeType()
DAYS = DaysType()
COUNT = click.IntRange(0, (1 << 63) - 1)


def json_option(function: F) -> F:
    """Add ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")(function)
