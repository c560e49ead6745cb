"""Which works are run in which state of the caches, in what order, and what the project wants to reach.

Pure data. A session is one mount of one system; a work is one row of the tables.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from bench.systems import Purpose

_SMALL: Final = ("create_4k", "create_64k")
_BIG: Final = ("write_big",)


class Unit(Enum):
    """How a row is written; the ratio is the quotient of times in both."""

    PER_OPERATION = "us/op"
    THROUGHPUT = "MiB/s"


@dataclass(frozen=True, slots=True)
class Work:
    """A row: a function of `bench.works`, under a name that tells the state of the caches as well.

    `needs` are functions that must have run in the round before; they are run unrecorded where nobody asked for them.
    """

    key: str
    function: str
    title: str
    unit: Unit = Unit.PER_OPERATION
    # How many times as fast as JuiceFS the project wants to be; None where it promises nothing.
    goal: float | None = None
    # The same where the metadata come from a service, if it differs.
    service_goal: float | None = None
    needs: tuple[str, ...] = ()

    def goal_in(self, pair: str) -> float | None:
        """Return the goal in one pair."""
        return self.service_goal or self.goal if pair == "service" else self.goal


@dataclass(frozen=True, slots=True)
class Session:
    """Works that share one mount, in order.

    The mount is new and the page cache was dropped on both sides. The cache directory is empty if `fill` is; else the
    functions in `fill` have read through a mount before, and only their cache directory was kept.
    """

    purpose: Purpose
    works: tuple[Work, ...]
    fill: tuple[str, ...] = ()


SESSIONS: Final = (
    Session(
        Purpose.WRITE,
        (
            Work("create-4k", "create_4k", "create 4 KiB files", goal=3.0, service_goal=2.0),
            Work("create-64k", "create_64k", "create 64 KiB files"),
        ),
    ),
    Session(
        Purpose.WRITE,
        (
            Work("tree-build", "build_tree", "source tree: mkdir, write, chmod, rename", goal=3.0, service_goal=2.0),
            Work(
                "tree-remove",
                "remove_tree",
                "rm -r of the source tree",
                goal=3.0,
                service_goal=2.0,
                needs=("build_tree",),
            ),
        ),
    ),
    Session(
        Purpose.WRITE,
        (Work("big-write", "write_big", "big file, write and fsync", Unit.THROUGHPUT, goal=1.0),),
    ),
    Session(
        Purpose.READ,
        (
            Work("walk-cold", "walk", "walk with stat, cold", goal=1.0, needs=_SMALL),
            Work("walk-again", "walk", "walk with stat, again", goal=1.0, needs=_SMALL),
        ),
    ),
    Session(
        Purpose.READ,
        (
            Work("stat-cold", "stat_by_path", "stat by path, cold", goal=1.0, needs=_SMALL),
            Work("stat-again", "stat_by_path", "stat by path, again", goal=1.0, needs=_SMALL),
        ),
    ),
    Session(
        Purpose.READ,
        (
            Work(
                "read-4k-cold", "read_4k", "read 4 KiB files, nothing cached", goal=5.0, service_goal=4.0, needs=_SMALL
            ),
            Work(
                "read-64k-cold",
                "read_64k",
                "read 64 KiB files, nothing cached",
                goal=5.0,
                service_goal=4.0,
                needs=_SMALL,
            ),
        ),
    ),
    Session(
        Purpose.READ,
        (
            Work("read-4k-warm", "read_4k", "read 4 KiB files, disk cache warm", needs=_SMALL),
            Work("read-64k-warm", "read_64k", "read 64 KiB files, disk cache warm", needs=_SMALL),
        ),
        fill=("read_4k", "read_64k"),
    ),
    Session(
        Purpose.READ,
        (Work("big-cold", "read_big", "big file, sequential, cold", Unit.THROUGHPUT, goal=1.0, needs=_BIG),),
    ),
    Session(
        Purpose.READ,
        (
            Work("big-warm", "read_big", "big file, disk cache warm", Unit.THROUGHPUT, goal=1.0, needs=_BIG),
            Work("big-again", "read_big", "big file, again", Unit.THROUGHPUT, goal=1.0, needs=_BIG),
        ),
        fill=("read_big",),
    ),
    Session(
        Purpose.READ,
        (Work("random-cold", "read_random", "random 4 KiB, nothing cached", needs=_BIG),),
    ),
    Session(
        Purpose.READ,
        (Work("random-warm", "read_random", "random 4 KiB, disk cache warm", needs=_BIG),),
        fill=("read_big",),
    ),
)

WORKS: Final = {work.key: work for session in SESSIONS for work in session.works}


def choose(keys: Collection[str]) -> tuple[Session, ...]:
    """Keep the works with these keys, and the sessions that still have some."""
    chosen = [replace(session, works=tuple(work for work in session.works if work.key in keys)) for session in SESSIONS]
    return tuple(session for session in chosen if session.works)
