"""The entry of ``atoll``: its commands by name, and what an error looks like.

Owns the list of commands (imported when one is asked for) and the exit codes: 0; 1 with one line on stderr that ends with the
remedy; 2 for usage, with one line as well; 130 after Ctrl-C.
"""

from __future__ import annotations

import contextlib
import os
import sys
from importlib import import_module
from typing import Any, Final, NoReturn

import click

from client.cli.output import one_line

COMMANDS: Final = {
    "format": "Make a volume.",
    "serve": "Serve the metadata of volumes to other machines.",
    "mount": "Mount a volume; returns when it answers.",
    "umount": "Unmount; returns when all is uploaded and the daemon has ended.",
    "status": "Show what a volume is, who holds it and what is in it.",
    "info": "Show what a file or directory is made of.",
    "stats": "Show the counters of a volume's holder.",
    "top": "Show what a mount, or a volume of a service, is doing now.",
    "gc": "Delete objects that nothing needs.",
    "fsck": "Check that a volume is whole and consistent.",
    "trash": "List, restore or empty what was removed.",
    "quota": "Limit directories, or the volume.",
    "clone": "Copy a file or tree without copying bytes.",
    "tenant": "Make, list, limit or delete tenants of a service.",
    "token": "Make, list or revoke tokens of a service.",
    "keys": "Give a service the keys of a bucket.",
    "delete": "Delete a volume of a service.",
    "dump": "Write the names and chunk maps of a volume to a file.",
    "load": "Make a volume from a dump or a backup.",
    "backups": "List the backups of a volume, or in a bucket.",
}
"""With what ``atoll --help`` says of each; the module client.cli.NAME has the command NAME."""


class LazyGroup(click.Group):
    """Import a command when it is needed."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"client.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _show_version(ctx: click.Context, _parameter: click.Parameter, value: Any) -> None:
    if not value or ctx.resilient_parsing:
        return
    # importlib.metadata costs 20 ms, which only --version pays.
    from importlib.metadata import version

    click.echo(f"atoll {version('atollfs')}")
    ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_show_version,
    help="Show the version and exit.",
)
def atoll() -> None:
    """A POSIX file system for training jobs: names in a metadata service, bytes in object storage.

    ADDRESS is the directory of an embedded volume, or atoll://HOST:PORT/TENANT/VOLUME for one of a service. PATH is a path
    under a mount, or ADDRESS:/path.
    """


def main() -> NoReturn:
    """Run the command line and exit.

    Everything that a command opened is closed when it returns, so the interpreter is not torn down: threads of the object
    store's library that wake up meanwhile abort the process (seen: exit by SIGABRT after a refused key, on a busy machine).
    """
    try:
        run()
    except SystemExit as ended:
        code = ended.code
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def run() -> NoReturn:
    """Run the command line; SystemExit says how it ended."""
    # The exit is this function's: click's own would print usage errors in several lines.
    try:
        code = atoll.main(standalone_mode=False)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else "atoll"
        fail(f"{error.format_message().rstrip('.')} (see {command} --help)", code=2)
    except click.exceptions.Abort:
        fail("interrupted", code=130)
    except KeyboardInterrupt:
        fail("interrupted", code=130)
    except BrokenPipeError:
        # The reader of our output has enough (`atoll stats | head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("ATOLL_TRACEBACK"):
            raise
        fail(one_line(error), code=1)
    sys.exit(code if isinstance(code, int) else 0)


def fail(message: str, *, code: int) -> NoReturn:
    """Print an error and exit."""
    click.echo(f"atoll: {message}", err=True)
    sys.exit(code)
