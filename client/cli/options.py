"""Types and options that several commands share."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from client.sizes import parse_size

if TYPE_CHECKING:
    from metasvc.jobs.backups import BackupPolicy

F = TypeVar("F", bound=Callable[..., Any])
MIN_BACKUP_S: Final = 60.0
MAX_BACKUP_S: Final = 7 * 86400.0


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


class DurationType(click.ParamType[float]):
    """A duration: a number with s, m, h or d; in seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)([smhd])", value) if isinstance(value, str) else None
        if match is None:
            self.fail(f"{value!r} is no duration: give a number with s, m, h or d, as 90s, 12h or 30d", param, ctx)
        return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


SIZE = SizeType()
DURATION = DurationType()
DAYS = DaysType()
COUNT = click.IntRange(0, (1 << 63) - 1)


def backup_options(function: F) -> F:
    """Add ``--backup`` and ``--backup-window``."""
    function = click.option(
        "--backup-window",
        type=DURATION,
        default="1d",
        show_default=True,
        help="Objects that backups of so long ago name are kept.",
    )(function)
    return click.option(
        "--backup", type=DURATION, help="Dump the metadata into the volume's bucket so often, for example 1h.  [never]"
    )(function)


def backup_policy(every_s: float | None, window_s: float) -> BackupPolicy | None:
    """Return what the two options say. UsageError."""
    from metasvc.jobs.backups import BackupPolicy

    if every_s is None:
        return None
    if not MIN_BACKUP_S <= every_s <= MAX_BACKUP_S:
        raise click.UsageError("--backup is 1m to 7d: give for example 1h")
    return BackupPolicy(every_s=every_s, window_s=int(window_s))


def token_option(function: F) -> F:
    """Add ``--token-file``, and how the service is reached: ``--tls-ca``, ``--insecure``."""
    help_text = "The token for a service  [default: ATOLL_TOKEN, ATOLL_TOKEN_FILE]"
    return click.option("--token-file", metavar="FILE", help=help_text)(tls_options(function))


def tls_options(function: F) -> F:
    """Add ``--tls-ca`` and ``--insecure``: both stand for variables of the environment, and are set there for what follows."""
    insecure = click.option(
        "--insecure",
        is_flag=True,
        expose_value=False,
        callback=_set_insecure,
        help="Send the token in plain text (atoll://) to other machines, too  [default: ATOLL_INSECURE]",
    )
    return ca_option(insecure(function))


def ca_option(function: F) -> F:
    """Add ``--tls-ca``."""
    help_text = "Authorities to believe besides the system's, in PEM  [default: ATOLL_TLS_CA]"
    return click.option("--tls-ca", metavar="FILE", expose_value=False, callback=_set_ca, help=help_text)(function)


def _set_ca(_: click.Context, __: click.Parameter, value: str | None) -> None:
    if value is not None:
        from client.meta.encryption import CA_VARIABLE

        # Absolute: a mount leaves the working directory.
        os.environ[CA_VARIABLE] = os.path.abspath(value)


def _set_insecure(_: click.Context, __: click.Parameter, value: Any) -> None:
    if value:
        from client.meta.encryption import INSECURE_VARIABLE

        os.environ[INSECURE_VARIABLE] = "1"


def json_option(function: F) -> F:
    """Add ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")(function)
