"""Measure what an honest client of a metadata service loses while others attack the service.

    python bench/attacks.py [--quick] [--only WORD] [--output DIRECTORY]

`atoll serve` on SQLite runs on one processor. On the other one are the honest client (bench.bystander), which works in a volume
of another tenant and in the attacked volume by turns, and the attacker (bench.attackers) at SCHED_IDLE: it runs when the
honest client waits, so what the honest client loses it loses to the service. Neither processor ever sleeps: something spins at
SCHED_IDLE, else waking them would cost more without an attack than with one. There are two services, new for each run, one in
plain text and one by TLS for the kinds that TLS makes dearer.

First every attempt of the table in tests/metasvc/server/attacks.py is made once: each must be refused with its error, and the
volume must be as before. Then windows with an attack and windows without take turns, and for each kind the table has

- the speed of the honest client with the attack by that without (the median quotient of neighbouring windows, as disks are
  slower now and then, for crowds that of the sums; in brackets the quartiles of windows), in another tenant's volume and in the
  attacked one,
- P99 of its operations, and the longest one; and the median of a new connection with one small call, as of a client that comes,
- attempts in a second, and the processor time of the service for each: what it took more than it takes for as much honest work,
- what the service said to the attempts.

Kinds at 50 attempts in a second are what a limit on refusals would let through anyway. Kinds that are made one after the other,
as fast as it goes, take a share of the one processor of the service as any client does that asks as fast as it can: the table
has such a client for comparison ("a getattr that is allowed"). So has it the same windows without any attack ("nothing"): no
difference that is smaller than the spread of those means anything.

Crowds are up to 10,000 connections that fall silent, at the start, within their first message, within a later one, or that
read nothing of what they asked for. Their figures are those while they come, while they stand, while the service ends them,
and of all this together (what was done by the time that it took), with its memory. Packets without a connection (a flood of
SYN) meet the kernel and not the service: they are not made.

Timings are reported and never judged. The exit status is 1 if an attempt was not refused as it must be, the honest client had
an error or had to reconnect, or the service ended.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Final

import click

# Started as a file, Python looks for modules beside it; the benchmark imports its own by their full names.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.environment import describe
from bench.memory import peak_bytes
from bench.processes import StepFailed, go_on_unless_interrupted, has_ended, interrupt_once, running
from bench.roles import Role, role
from bench.servers import MetadataService, prepare_store, serving

HERE: Final = Path(__file__).resolve().parent
OTHERS: Final = "rival/data"
ATTACKED: Final = "team/data"
PACED: Final = 50.0
MIB: Final = 1024 * 1024
GOAL: Final = 0.9
_SPIN: Final = """import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
while True:
    pass
"""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is done."""

    pairs: int
    window_s: float
    crowd_pairs: int
    crowd: int
    """Connections at most."""
    crowd_windows: int
    """Before each crowd, and while one stands that is not waited for."""
    awaited: int
    """So many kinds of crowds are waited for until the service has ended them."""
    only: str


FULL: Final = Plan(pairs=8, window_s=0.7, crowd_pairs=3, crowd=10_000, crowd_windows=7, awaited=2, only="")
QUICK: Final = Plan(pairs=3, window_s=0.05, crowd_pairs=1, crowd=2_000, crowd_windows=2, awaited=1, only="")

KINDS: Final[Sequence[tuple[str, float | None, bool]]] = (
    ("nothing", None, False),
    ("out of a subtree", PACED, False),
    ("out of a subtree", None, False),
    ("tokens that are no good here", PACED, False),
    ("tokens that are no good here", None, False),
    ("read-only tokens that write", PACED, False),
    ("read-only tokens that write", None, False),
    ("users that administer", PACED, False),
    ("users that administer", None, False),
    ("sessions, slices and messages", PACED, False),
    ("sessions, slices and messages", None, False),
    ("damaged messages", PACED, False),
    ("300 MiB in one message", 1.0, False),
    ("300 MiB in one message", None, False),
    ("no opening", PACED, False),
    ("no opening", None, False),
    ("connects and goes", PACED, False),
    ("connects and goes", None, False),
    ("a getattr that is allowed", PACED, False),
    ("a getattr that is allowed", None, False),
    ("a session that is allowed", PACED, False),
    ("a session that is allowed", None, False),
    ("nothing", None, True),
    ("tokens that are no good here", PACED, True),
    ("connects and goes", PACED, True),
    ("connects and goes", None, True),
)
"""Name, attempts in a second (None: one after the other), by TLS."""

CROWDS: Final[Sequence[tuple[str, int, bool]]] = (
    ("silent", 10_000, True),
    ("silent within an opening of 16 KiB", 10_000, True),
    ("silent within a message of 15 MiB", 32, False),
    ("ask for 256 pages of a directory and read nothing", 2, False),
)
"""Name, connections, whether it is waited for until the service has ended them: that takes ten seconds before they have said
who they are, and half a minute or a minute in a session."""


@dataclass(slots=True)
class Window:
    """What an honest client did in some windows."""

    turns_per_s: dict[str, list[float]] = field(default_factory=lambda: {OTHERS: [], ATTACKED: []})
    """By volume; of each window."""
    busy_s: dict[str, float] = field(default_factory=lambda: {OTHERS: 0.0, ATTACKED: 0.0})
    done: dict[str, int] = field(default_factory=lambda: {OTHERS: 0, ATTACKED: 0})
    """Turns, by volume, in ``busy_s``."""
    durations_us: list[int] = field(default_factory=list)
    newcomers_us: list[int] = field(default_factory=list)
    turns: int = 0
    service_cpu_s: float = 0.0

    def add(self, told: dict[str, Any], cpu_s: float) -> None:
        for volume, did in told["volumes"].items():
            if did["turns"]:
                self.turns_per_s[volume].append(did["turns"] / did["busy_s"])
            self.busy_s[volume] += did["busy_s"]
            self.done[volume] += did["turns"]
            self.durations_us += did["durations_us"]
            self.turns += did["turns"]
        self.newcomers_us += told["newcomers_us"]
        self.service_cpu_s += cpu_s

    def speed(self, volume: str) -> float:
        """Return turns in a second over all windows."""
        return self.done[volume] / self.busy_s[volume]

    @property
    def p99_ms(self) -> float:
        ordered = sorted(self.durations_us)
        return ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] / 1e3 if ordered else 0.0

    @property
    def longest_ms(self) -> float:
        return max(self.durations_us, default=0) / 1e3

    @property
    def newcomer_ms(self) -> float:
        return median(self.newcomers_us) / 1e3 if self.newcomers_us else 0.0


@dataclass(frozen=True, slots=True)
class Loss:
    """The figures of one kind of attack."""

    kind: str
    rate: str
    speed: dict[str, tuple[float, float, float]]
    """By volume, with the attack by without: median, lower and upper quartile."""
    p99_ms: tuple[float, float]
    """Without, with."""
    longest_ms: tuple[float, float]
    newcomer_ms: tuple[float, float]
    per_second: float
    cpu_us: float | None
    """Of the service for an attempt."""
    memory_mib: tuple[float, float, float]
    """Resident: before, after, peak."""
    told: dict[str, int]


class Damage(Exception):
    """An attack that did what it must not do."""


@dataclass(slots=True)
class Field:
    """A service with its honest client and its attacker."""

    service: MetadataService
    honest: Role
    attacker: Role
    wrong: list[str] = field(default_factory=list)

    def window(self, seconds: float, *into: Window) -> None:
        """Let the honest client work for so long."""
        before_s = _cpu_s(self.service.pid)
        told = self.honest.ask("measure", seconds=seconds, limit_s=seconds + 120)
        for window in into:
            window.add(told, _cpu_s(self.service.pid) - before_s)
        if told["reconnections"]:
            raise StepFailed("the honest client had to reconnect")
        if has_ended(self.service.pid):
            raise StepFailed("the service has ended")

    def windows_until_heard(self, into: Sequence[Window], *, limit_s: float) -> Any:
        """Let the honest client work until the attacker answers; the answer."""
        end_s = time.monotonic() + limit_s
        while not self.attacker.has_answered() and time.monotonic() < end_s:
            self.window(0.1, *into)
        return self.attacker.hear(limit_s=1.0)

    def memory_mib(self) -> float:
        """Return what is resident of the service."""
        pages = int(Path(f"/proc/{self.service.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / MIB

    def forget_peak(self) -> None:
        """Let the peak of the service's memory begin anew."""
        Path(f"/proc/{self.service.pid}/clear_refs").write_text("5")


def _cpu_s(pid: int) -> float:
    """Return the processor time of a process, to the nanosecond: the clock of clock_getcpuclockid(3)."""
    return time.clock_gettime((~pid << 3) | 2)


def attacked(ground: Field, plan: Plan, kind: str, rate: float | None) -> Loss:
    """Measure one kind of attempt."""
    without, with_it = Window(), Window()
    told: Counter[str] = Counter()
    seconds = 0.0
    before_mib = ground.memory_mib()
    ground.forget_peak()
    # What is made once (tokens, sessions) is made before anything is timed.
    ground.attacker.ask("start", kind=kind, rate=rate)
    ground.window(plan.window_s / 2, Window())
    ground.attacker.ask("stop", limit_s=120)
    for _ in range(plan.pairs):
        ground.window(plan.window_s, without)
        began_s = time.monotonic()
        ground.attacker.ask("start", kind=kind, rate=rate)
        ground.window(plan.window_s, with_it)
        stopped = ground.attacker.ask("stop", limit_s=120)
        seconds += time.monotonic() - began_s
        told.update(stopped["told"])
        ground.wrong += [f"{kind}: {wrong}" for wrong in stopped["wrong"]]
    attempts = told.total()
    honest_s = without.service_cpu_s / without.turns * with_it.turns
    return _loss(
        ground,
        kind,
        "one after the other" if rate is None else f"{rate:g}/s",
        without,
        with_it,
        before_mib=before_mib,
        per_second=attempts / seconds,
        cpu_us=(with_it.service_cpu_s - honest_s) / attempts * 1e6 if attempts and kind != "nothing" else None,
        told=told,
    )


def _loss(
    ground: Field,
    kind: str,
    rate: str,
    without: Window,
    with_it: Window,
    *,
    before_mib: float,
    per_second: float = 0.0,
    cpu_us: float | None = None,
    told: Counter[str],
) -> Loss:
    return Loss(
        kind,
        rate,
        {volume: _quotient(without, with_it, volume) for volume in with_it.turns_per_s},
        (without.p99_ms, with_it.p99_ms),
        (without.longest_ms, with_it.longest_ms),
        (without.newcomer_ms, with_it.newcomer_ms),
        per_second,
        cpu_us,
        (before_mib, ground.memory_mib(), peak_bytes(ground.service.pid) / MIB),
        dict(told),
    )


def _quotient(without: Window, with_it: Window, volume: str) -> tuple[float, float, float]:
    """Return a quotient, and quartiles: the median of neighbours where windows are pairs, else what was done in all of them."""
    before, after = without.turns_per_s[volume], with_it.turns_per_s[volume]
    is_paired = len(before) == len(after)
    if not is_paired:
        before = [without.speed(volume)] * len(after)
    each = sorted(b / a for a, b in zip(before, after, strict=True))
    middle = median(each) if is_paired else with_it.speed(volume) / without.speed(volume)
    return middle, each[len(each) // 4], each[-1 - len(each) // 4]


def crowded(ground: Field, plan: Plan, kind: str, count: int, *, is_awaited: bool) -> Iterator[Loss]:
    """Measure a crowd: while it comes, while it stands, while the service ends it, and all of that."""
    without, coming, standing, ending, whole = Window(), Window(), Window(), Window(), Window()
    told: Counter[str] = Counter()
    before_mib, took_s = ground.memory_mib(), []
    ground.forget_peak()
    limit_s = 120.0
    for _ in range(plan.crowd_pairs):
        for _ in range(plan.crowd_windows):
            ground.window(plan.window_s, without)
        ground.attacker.tell("gather", kind=kind, count=count)
        took_s.append(ground.windows_until_heard((coming, whole), limit_s=limit_s))
        if is_awaited:
            ground.attacker.tell("first_end")
            ground.windows_until_heard((standing, whole), limit_s=limit_s)
            ground.attacker.tell("ends")
            ground.windows_until_heard((ending, whole), limit_s=limit_s)
        else:
            for _ in range(plan.crowd_windows):
                ground.window(plan.window_s, standing, whole)
        told.update(ground.attacker.ask("disperse", limit_s=limit_s))
    phases = [("come", coming), ("stand", standing)]
    if is_awaited:
        phases.append(("are ended", ending))
    for what, window in [*phases, ("in all", whole)]:
        yield _loss(
            ground,
            kind,
            f"{count:,} {what}",
            without,
            window,
            before_mib=before_mib,
            per_second=count / median(took_s) if window is coming else 0.0,
            told=told if window is whole else Counter(),
        )


# -- what is attacked -----------------------------------------------------------------------------------------------------


async def _populate(url: str, place: Path) -> bytes:
    """Make the volumes of the world in a store; the key that tokens are signed with."""
    from metasvc.engine import first_rows
    from metasvc.server.tokens import TOKEN_KEY
    from metasvc.store.open import open_store
    from tests.metasvc.engine.volumes import volume_format
    from tests.metasvc.server.attacks import VOLUMES

    store = await open_store(url)
    try:
        for tenant, name, number in VOLUMES:
            bucket = place / f"bucket-{number}"
            bucket.mkdir()
            form = replace(
                volume_format(),
                tenant=tenant,
                name=name,
                uuid=f"00000000-0000-0000-0000-00000000000{number}",
                bucket_url=f"file://{bucket}",
            )
            await store.add_tenant(tenant, created_ns=1)
            await store.create_volume(form, first_rows(form))
        key = await store.setting(TOKEN_KEY)
    finally:
        await store.close()
    if key is None:
        raise StepFailed("the store was not prepared")
    return key


def _pin(pid: int, processor: int | None) -> None:
    """Bind all threads of a process."""
    if processor is not None:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {processor})


@contextmanager
def battlefield(place: Path, processors: Sequence[int], *, is_encrypted: bool) -> Iterator[Field]:
    """Run a service, an honest client and an attacker."""
    from tests.servers.certificates import Authority

    place.mkdir()
    service_on, clients_on = (processors[0], processors[1]) if len(processors) > 1 else (None, None)
    options: tuple[str, ...] = ()
    ca = None
    if is_encrypted:
        authority = Authority(place)
        options, ca = authority.issue("127.0.0.1").options, str(authority.ca)
    url = f"sqlite:///{place}/meta.db"
    token = prepare_store(url, log=place / "init")
    key = asyncio.run(_populate(url, place))
    with ExitStack() as stack:
        service = stack.enter_context(serving(url, token, place, environment=dict(os.environ), options=options))
        _pin(service.pid, service_on)
        arguments = {"port": int(service.address.rpartition(":")[2]), "token": token, "ca": ca, "processor": clients_on}
        further = {"key": key.hex(), "names": 5000}
        attacker = stack.enter_context(
            role(HERE / "attackers.py", {**arguments, **further}, log=place / "attacker.log")
        )
        # It has made the world when it answers.
        attacker.ask("disperse", limit_s=120)
        honest = stack.enter_context(
            role(HERE / "bystander.py", {**arguments, "volumes": [OTHERS, ATTACKED]}, log=place / "honest.log")
        )
        _pin(service.pid, service_on)
        yield Field(service, honest, attacker)


def _run(place: Path, plan: Plan) -> tuple[list[Loss], dict[str, Any], list[str]]:
    """Do everything; the figures, what the table was told, and what is wrong."""
    losses: list[Loss] = []
    processors = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        if len(processors) > 1:
            stack.enter_context(running([sys.executable, "-c", _SPIN, str(processors[0])], log=place / "spin.log"))
        grounds = {
            is_encrypted: stack.enter_context(
                battlefield(place / ("tls" if is_encrypted else "plain"), processors, is_encrypted=is_encrypted)
            )
            for is_encrypted in (False, True)
        }
        checked: dict[str, Any] = grounds[False].attacker.ask("check", limit_s=180)
        click.echo(f"{checked['attempts']} attempts of the table, {len(checked['wrong'])} of them wrong", err=True)
        wrong = list(checked["wrong"])
        for ground in grounds.values():
            ground.window(plan.window_s, Window())
        for kind, rate, is_encrypted in KINDS:
            if plan.only in kind:
                loss = attacked(grounds[is_encrypted], plan, kind, rate)
                losses.append(replace(loss, kind=f"{kind} (TLS)") if is_encrypted else loss)
                _tell(losses[-1])
        for number, (kind, most, is_awaited) in enumerate(CROWDS):
            if plan.only in kind:
                count = min(plan.crowd, most)
                for loss in crowded(grounds[False], plan, kind, count, is_awaited=is_awaited and number < plan.awaited):
                    losses.append(loss)
                    _tell(loss)
        for ground in grounds.values():
            wrong += ground.wrong
    return losses, checked, wrong


# -- the report -----------------------------------------------------------------------------------------------------------


def _tell(loss: Loss) -> None:
    click.echo(
        f"{loss.kind}, {loss.rate}: others {loss.speed[OTHERS][0]:.2f}, same volume {loss.speed[ATTACKED][0]:.2f}, "
        f"{loss.per_second:.0f}/s, {loss.memory_mib[2]:.0f} MiB, {loss.told}",
        err=True,
    )


def _cell(loss: Loss, volume: str) -> str:
    quotient, lowest, highest = loss.speed[volume]
    text = f"{quotient:.2f} ({lowest:.2f} to {highest:.2f})"
    return f"**{text}**" if quotient < GOAL else text


def _table(losses: Sequence[Loss]) -> str:
    head = (
        "| attack | how often | speed in another tenant's volume | in the attacked one | P99 ms | longest ms | newcomer ms "
        "| attempts/s | CPU us | MiB before, after, peak | told |"
    )
    lines = [head, "| --- | --- |" + " ---: |" * 8 + " --- |"]
    for loss in losses:
        told = ", ".join(f"{count:,} {what}" for what, count in sorted(loss.told.items(), key=lambda one: -one[1]))
        cpu = "" if loss.cpu_us is None else f"{loss.cpu_us:,.0f}"
        lines.append(
            f"| {loss.kind} | {loss.rate} | {_cell(loss, OTHERS)} | {_cell(loss, ATTACKED)} "
            f"| {loss.p99_ms[0]:.1f} → {loss.p99_ms[1]:.1f} | {loss.longest_ms[0]:.0f} → {loss.longest_ms[1]:.0f} "
            f"| {loss.newcomer_ms[0]:.1f} → {loss.newcomer_ms[1]:.1f} | {loss.per_second or 0:,.0f} | {cpu} "
            f"| {loss.memory_mib[0]:.0f}, {loss.memory_mib[1]:.0f}, {loss.memory_mib[2]:.0f} | {told} |"
        )
    return "\n".join(lines) + "\n"


def _report(losses: Sequence[Loss], checked: dict[str, Any], wrong: Sequence[str]) -> str:
    told = ", ".join(f"{count} {what}" for what, count in checked["told"].items())
    head = f"{checked['attempts']} attempts of the table, each once: {told}.\n"
    tail = "".join(f"- {each}\n" for each in wrong)
    pinned = "one for the service, one for honest client and attacker; the attacker at SCHED_IDLE"
    if len(os.sched_getaffinity(0)) < 2:
        pinned = "one processor for all, the attacker at SCHED_IDLE"
    return f"{head}\nProcessors: {pinned}. Bold: below {GOAL}.\n\n{_table(losses)}" + (
        f"\nWrong:\n{tail}" if tail else ""
    )


@click.command(help=__doc__.splitlines()[0])
@click.option("--quick", is_flag=True, help="Windows of a moment and 2,000 connections: whether it runs, not how fast.")
@click.option("--only", default="", help="Kinds whose name has this word.")
@click.option("--output", type=click.Path(path_type=Path), help="Directory of results.")
@click.option("--scratch", type=click.Path(exists=True, file_okay=False, path_type=Path), default="/var/tmp")
@click.option("--keep", is_flag=True, help="Leave the logs.")
def main(*, quick: bool, only: str, output: Path | None, scratch: Path, keep: bool) -> None:
    """Measure, and write the report."""
    interrupt_once(signal.SIGINT, signal.SIGTERM)
    place = Path(tempfile.mkdtemp(prefix="atoll-attacks-", dir=scratch))
    try:
        losses, checked, wrong = _run(place, replace(QUICK if quick else FULL, only=only))
        text = _report(losses, checked, wrong)
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            document = {
                "environment": asdict(describe(place)),
                "checked": checked,
                "wrong": wrong,
                "kinds": [asdict(loss) for loss in losses],
            }
            (output / "attacks.json").write_text(json.dumps(document, indent=2) + "\n")
            (output / "attacks.md").write_text(text)
        click.echo(text)
    except StepFailed as error:
        go_on_unless_interrupted(error)
        raise click.ClickException(str(error)) from error
    finally:
        if keep:
            click.echo(f"logs: {place}", err=True)
        else:
            shutil.rmtree(place, ignore_errors=True)
    if wrong:
        raise click.ClickException("attempts were not refused as they must be")


if __name__ == "__main__":
    main()
