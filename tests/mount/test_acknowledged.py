"""Two service processes, one mount that writes: whoever is killed, what was acknowledged is there, once, and without an error.

160 writers (`programs/writer.py`) log each step before and after. Killed at random moments are the process that owns the
volume, the database below, or all of them; or the owner is ended by SIGTERM, or put to sleep until it has a successor. At
each of these moments at least 100 operations are in flight, which is demanded twice: the kernel counts the requests that wait
for the mount's answer just before, and the logs tell which steps began before the moment and ended after it.

Writers create exclusively, write, fsync, append, rename, link, unlink, mkdir, rmdir, truncate, chmod, set attributes. What
would be applied twice shows: the second of an exclusive create, mkdir or link meets EEXIST, of a rename or unlink ENOENT, which
ends the writer; of an append it shows in the content, of a link in the count of links. All files are read and compared, and
the volume is checked, after each kill.

The pause is what programs see of it: the longest time from the moment on in which no step of any writer ended, and how long
after the moment the last of the steps ended that were under way (each is several calls, and waits for 159 others).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from client.meta.endpoint import Endpoint
from metasvc.api import atoll_pb2 as pb
from metasvc.api.frames import EndedByService, Frames
from metasvc.api.server import Server, owner_of
from metasvc.model import ROOT_INO
from tests.mount import stores
from tests.mount.mounted import MountedVolume
from tests.mount.service import TENANT, ServiceProcess, mounted_from, services
from tests.mount.waiting import requests_waiting
from tests.mount.writers import Writers
from tests.servers.postgresql import PASSWORD, PostgreSQL
from tests.servers.redis import Redis

WRITERS: Final = 160
THREADS: Final = 80
IN_FLIGHT: Final = 100
IN_THE_KERNEL: Final = 120
"""Some are no steps, but what a writer looks at between them."""
ENOUGH_TO_GO_ON: Final = 150
"""Some are answered before the moment comes."""
STANDS_STILL_S: Final = 2.0
"""Far less than an ownership lasts."""
PAUSE_KILLED_S: Final = 15.0
PAUSE_ENDED_S: Final = 2.0
LEFT_OUT_OF_NAMES: Final = "asleep-"


class Pause(NamedTuple):
    """Hold what programs see of one kill."""

    silence_s: float
    last_s: float


@dataclass(slots=True)
class Scene:
    """Two processes of a service on one store, a mount of their volume, and writers on it."""

    processes: list[ServiceProcess]
    database: PostgreSQL | Redis | None
    volume: MountedVolume
    writers: Writers
    waiting: Callable[[], int]
    rng: random.Random
    pauses: list[Pause] = field(default_factory=list)

    def owner(self) -> ServiceProcess:
        """Return the process that owns the volume, as the service itself says."""
        server = owner_of(self.volume.document("status", self.volume.address)["owner"])
        assert server is not None
        (found,) = [process for process in self.processes if process.port == server.port]
        return found

    def disturb(self, what: str) -> None:
        """Do one thing to all this, at a random moment at which enough is in flight, and demand that it is a pause only."""
        owner = self.owner()
        with self.writers.working(self.rng.randrange(1 << 32)):
            in_kernel = self.wait_until_enough_is_in_flight(owner)
            began_ns = time.monotonic_ns()
            self.act(what, owner)
            self.writers.wait_for_steps(self.writers.steps() + 4 * WRITERS)
            if what.startswith("owner"):
                owner.start()
            self.judge_round(what, began_ns, in_kernel)

    def wait_until_enough_is_in_flight(self, owner: ServiceProcess) -> int:
        """Return, at a random moment, how many requests wait in the kernel: enough. AssertionError after a minute.

        So many only wait where writers are faster than what serves them, which they are not on a busy machine. So the owner
        stands still until they wait, and is at work again for a moment: what it has received, and has sent to the store,
        differs each time.
        """
        self.writers.wait_until_all_work()
        deadline = time.monotonic() + 60
        while True:
            # The moment is the scenario; nothing is synchronised by it.
            time.sleep(self.rng.uniform(0.0, 1.0))
            os.kill(owner.pid, signal.SIGSTOP)
            try:
                goes_on = time.monotonic() + STANDS_STILL_S
                while self.waiting() < ENOUGH_TO_GO_ON and time.monotonic() < goes_on:
                    time.sleep(0.001)
            finally:
                os.kill(owner.pid, signal.SIGCONT)
            assert time.monotonic() < deadline, f"{self.waiting()} requests wait"
            time.sleep(self.rng.uniform(0.0, 0.02))
            if (count := self.waiting()) >= IN_THE_KERNEL:
                return count

    def act(self, what: str, owner: ServiceProcess) -> None:
        """Kill or end something; the database comes back."""
        match what:
            case "owner killed":
                owner.kill()
            case "owner ended":
                assert owner.end() == 0
            case "database killed":
                assert self.database is not None
                self.database.kill()
                time.sleep(self.rng.choice((0.0, self.rng.uniform(0.0, 2.0))))
                self.database.start()
            case "all killed":
                for process in self.processes:
                    process.kill()
                if self.database is not None:
                    self.database.kill()
                    self.database.start()
                for process in self.processes:
                    process.start()
            case other:
                raise AssertionError(other)

    def judge_round(self, what: str, began_ns: int, in_kernel: int) -> None:
        """End the round: nobody met an error, 100 steps were under way at the moment, and all is as logged, once."""
        self.writers.stop_file.touch()
        exit_codes = self.writers.wait_for_end()
        logs = self.writers.logs()
        assert {log.errno for log in logs} == {None}, [log.message for log in logs if log.errno is not None]
        assert set(exit_codes) == {0}
        under_way = [step for log in logs if (step := log.during(began_ns)) is not None]
        assert len(under_way) >= IN_FLIGHT
        # Steps are long where 160 writers share a busy machine: what they take without a kill is shown beside.
        before_ns = [
            step["done_ns"] - step["at_ns"] for log in logs for step in log.acknowledged if step["done_ns"] < began_ns
        ]
        ends_ns = sorted(step["done_ns"] for log in logs for step in log.acknowledged if step["done_ns"] > began_ns)
        pause = Pause(
            silence_s=max(later - sooner for sooner, later in pairwise((began_ns, *ends_ns))) / 1e9,
            last_s=max(step["done_ns"] - began_ns for step in under_way) / 1e9,
        )
        self.pauses.append(pause)
        print(  # noqa: T201
            f"round {self.writers.round}: {what}, {in_kernel} requests in the kernel, {len(under_way)} steps under way"
            f" {dict(Counter(step['op'] for step in under_way))}: no step ended for {pause.silence_s:.2f} s,"
            f" the last of them after {pause.last_s:.2f} s; before, a step took up to {max(before_ns) / 1e9:.2f} s",
            flush=True,
        )
        self.writers.settle()
        assert self.volume.document("fsck", self.volume.address)["clean"]


@contextlib.contextmanager
def scene(kind: str, tmp_path: Path, request: pytest.FixtureRequest, seed: int) -> Iterator[Scene]:
    """Set all up; at the end what was written must be there for a mount without a cache, too."""
    database: PostgreSQL | Redis | None = None
    if kind != "sqlite":
        database = request.getfixturevalue(f"own_{kind}")
    store_url = stores.in_directory(tmp_path) if database is None else database.url()
    outside, bucket = tmp_path / "outside", tmp_path / "bucket"
    outside.mkdir()
    bucket.mkdir()
    print(f"seed {seed}")  # noqa: T201
    with (
        services(tmp_path, store_url, count=2) as processes,
        mounted_from(processes[0], tmp_path, "--bucket", f"file://{bucket}", "--trash-days", "0") as volume,
    ):
        with requests_waiting(volume.path) as waiting:
            writers = Writers(volume.path, outside, count=WRITERS, threads=THREADS)
            writers.make_directories()
            yield Scene(processes, database, volume, writers, waiting, random.Random(seed))
        volume.remount_with_empty_cache()
        writers.verify()
    for process in processes:
        said = process.log_path.read_text()
        assert PASSWORD not in said
        assert database is None or database.url().partition("@")[0].rpartition(":")[2] not in said
        assert "Traceback" not in said, said


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", stores.KINDS)
def test_what_was_acknowledged_is_there_once_after_a_kill(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, seed: int
) -> None:
    with scene(kind, tmp_path, request, seed) as here:
        rounds = ["owner killed", "owner ended", *(["database killed"] if here.database else [])]
        here.rng.shuffle(rounds)
        for what in rounds:
            here.disturb(what)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (kind, what)
        for kind in stores.KINDS
        for what in ("owner killed", "owner ended", "database killed", "all killed")
        if (kind, what) != ("sqlite", "database killed")
    ],
)
def test_what_was_acknowledged_is_there_once_after_20_kills(
    kind: str, what: str, tmp_path: Path, request: pytest.FixtureRequest, seed: int
) -> None:
    with scene(kind, tmp_path, request, seed) as here:
        for _ in range(20):
            here.disturb(what)
        silences, lasts = (sorted(figures) for figures in zip(*here.pauses, strict=True))
        print(f"{kind}, {what}: no step ended for {' '.join(f'{each:.2f}' for each in silences)} s")  # noqa: T201
        print(f"{kind}, {what}: the last one under way after {' '.join(f'{each:.2f}' for each in lasts)} s")  # noqa: T201
        assert len(lasts) == 20
        if what == "owner killed":
            assert silences[-1] < PAUSE_KILLED_S
        elif what == "owner ended":
            assert silences[-1] < PAUSE_ENDED_S


@dataclass(frozen=True, slots=True)
class Session:
    """A session with one process of the service, without a client's care: it goes nowhere else, and asks nothing twice."""

    frames: Frames

    @classmethod
    async def begin(cls, process: ServiceProcess) -> Session:
        """Begin a session."""
        endpoint = Endpoint([Server("127.0.0.1", process.port)], process.token)
        session = cls(await endpoint.connect(pb.Opening.SESSION, f"{TENANT}/data"))
        session.send(pb.FromClient(hello=pb.Hello(protocol=1, host="test", pid=1, mountpoint="/asleep", attempt=1)))
        assert (await session.receive()).welcome.session_id > 0
        return session

    def send(self, message: pb.FromClient) -> None:
        """Send a message."""
        self.frames.send(message.SerializeToString())

    async def receive(self) -> pb.FromService:
        """Return the next message; raises what ends the connection."""
        async with asyncio.timeout(60):
            return pb.FromService.FromString(await self.frames.read())

    async def rest(self) -> tuple[list[pb.Reply], Exception]:
        """Return all replies that come until the service ends the connection, and how it did."""
        replies: list[pb.Reply] = []
        try:
            while True:
                replies += (await self.receive()).replies
        except Exception as end:  # noqa: BLE001 (judged by the caller)
            return replies, end
        finally:
            self.frames.close()


def requests_of_all_kinds(number: int, count: int, tag: str) -> pb.FromClient:
    """Return so many reads, each of what another session changes, and so many changes, numbered from `number` on."""
    requests = []
    for each in range(count):
        name = b"writer%d" % (each % WRITERS)
        requests.append(pb.Request(lookup=pb.Lookup(parent=ROOT_INO, name=name)))
        made = f"{LEFT_OUT_OF_NAMES}{tag}-{each}".encode()
        requests.append(
            pb.Request(mknod=pb.MakeNode(caller=pb.Caller(), parent=ROOT_INO, name=made, mode=stat.S_IFREG))
        )
    for offset, request in enumerate(requests):
        request.number = number + offset
    return pb.FromClient(requests=requests, confirmed=number)


def put_to_sleep(process: ServiceProcess) -> None:
    """Stop it by SIGSTOP, and wait until no thread of it runs."""
    os.kill(process.pid, signal.SIGSTOP)
    deadline = time.monotonic() + 30
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        while (task / "stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("kind", "rounds"),
    [("postgresql", 1), *(pytest.param(kind, 20, marks=pytest.mark.slow) for kind in ("postgresql", "redis"))],
)
async def test_an_owner_that_slept_through_its_succession_writes_nothing_and_answers_no_read(
    kind: str, rounds: int, tmp_path: Path, request: pytest.FixtureRequest, seed: int
) -> None:
    # Not on SQLite: whoever stands still there keeps the lock, and is waited for.
    with scene(kind, tmp_path, request, seed) as here:
        for round_ in range(rounds):
            owner = here.owner()
            session = await Session.begin(owner)
            session.send(requests_of_all_kinds(1, 1, f"{round_}-awake"))
            answered: list[pb.Reply] = []
            while len(answered) < 2:
                answered += (await session.receive()).replies
            assert not any(reply.HasField("failure") for reply in answered)
            with here.writers.working(here.rng.randrange(1 << 32)):
                in_kernel = here.wait_until_enough_is_in_flight(owner)
                began_ns = time.monotonic_ns()
                put_to_sleep(owner)
                try:
                    # What it gets while it stands still it must not do when it wakes.
                    session.send(requests_of_all_kinds(3, IN_FLIGHT, f"{round_}"))
                    await asyncio.sleep(0.1)  # lets the event loop send, if it did not at once
                    here.writers.wait_for_steps(here.writers.steps() + 4 * WRITERS)
                finally:
                    os.kill(owner.pid, signal.SIGCONT)
                replies, end = await session.rest()
                here.judge_round("owner asleep", began_ns, in_kernel)
            assert replies == []
            assert isinstance(end, EndedByService), end
            successor = here.owner()
            assert successor is not owner
            assert f"volume {TENANT}/data was lost" in owner.log_path.read_text()
            # Asked itself, it sends on to its successor.
            alone = f"atoll://127.0.0.1:{owner.port}/{TENANT}/data"
            told = owner_of(here.volume.document("status", alone)["owner"])
            assert told == Server("127.0.0.1", successor.port)
        made = {name for name in os.listdir(here.volume.path) if name.startswith(LEFT_OUT_OF_NAMES)}
        assert made == {f"{LEFT_OUT_OF_NAMES}{round_}-awake-0" for round_ in range(rounds)}
