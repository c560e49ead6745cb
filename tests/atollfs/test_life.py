"""From the first operation to the end of the process: opening, sharing, ending, forks, and a service that goes away."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from atollfs import AtollFileSystem
from atollfs.tree import Tree
from atollfs.volumes import NotAfterFork
from chunkstore.geometry import MIB
from client.volume import TokenMissing, VolumeBusy
from metasvc.errors import VolumeMissing
from tests.atollfs.places import Place, command, embedded_place, service_place
from tests.mount.service import ServiceProcess, service
from tests.mount.stores import about_embedded_volumes

HEAVY = "'google', 'obstore', 'blake3', 'structlog', 'pyfuse3', 'client.vfs.vfs'"


def run_python(program: str, *arguments: str) -> str:
    """Run a program of Python to its end, which must be good; its stdout."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def test_importing_it_and_making_a_file_system_loads_no_heavy_library() -> None:
    program = f"import sys, atollfs; atollfs.AtollFileSystem('/v'); print(*sorted({{{HEAVY}}} & sys.modules.keys()))"
    assert run_python(program).split() == []


def test_what_a_program_left_open_is_flushed_at_its_exit(service_volume: Place) -> None:
    program = """
import json, sys
from atollfs import AtollFileSystem
fs = AtollFileSystem(**json.loads(sys.argv[1]))
small, big = fs.open("/left/small", "wb"), fs.open("/left/big", "wb")
small.write(b"small")
big.write(b"big" * 1_000_000)
"""
    run_python(program, json.dumps(service_volume.options))
    with service_volume.opened() as fs:
        assert fs.cat_file("/left/small") == b"small"
        assert fs.cat_file("/left/big") == b"big" * 1_000_000


def test_an_embedded_volume_is_whole_after_programs_that_never_close_it(tmp_path: Path) -> None:
    place = embedded_place(tmp_path)
    program = """
import json, sys
from atollfs import AtollFileSystem
fs = AtollFileSystem(**json.loads(sys.argv[1]))
fs.open("/file", "ab").write(b"x" * 50_000)
assert fs.open("/file", "rb").seek(0, 2) in (0, 50_000, 100_000)
"""
    for _ in range(2):
        run_python(program, json.dumps(place.options))
    with place.opened() as fs:
        assert fs.size("/file") == 100_000
    command("fsck", place.options["address"])


def test_an_embedded_volume_in_another_process_is_busy_until_it_is_closed_there(tmp_path: Path) -> None:
    place = embedded_place(tmp_path)
    program = """
import json, sys
from atollfs import AtollFileSystem
with AtollFileSystem(**json.loads(sys.argv[1])) as fs:
    fs.touch("/theirs")
    print("open", flush=True)
    sys.stdin.readline()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, json.dumps(place.options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "open\n"
        with place.opened() as fs:
            with pytest.raises(VolumeBusy, match=rf"pid {other.pid}"):
                fs.ls("/")
            other.stdin.write("\n")
            other.stdin.flush()
            assert other.wait(30) == 0
            # The same file system: a failed opening is tried again.
            assert fs.ls("/", detail=False) == ["/theirs"]


@about_embedded_volumes
def test_while_it_is_mounted_the_refusal_names_the_mount_point(tmp_path: Path) -> None:
    from tests.mount.mounted import mounted

    with (
        mounted(tmp_path) as volume,
        AtollFileSystem(volume.address, cache_dir=volume.cache_dir, skip_instance_cache=True) as fs,
    ):
        with pytest.raises(VolumeBusy, match=f"atoll umount {volume.path}"):
            fs.ls("/")
        (volume.path / "file").write_bytes(b"x" * 100_000)
        volume.unmount()
        assert fs.cat_file("/file") == b"x" * 100_000
        fs.close()
        volume.mount()
        assert (volume.path / "file").read_bytes() == b"x" * 100_000


def test_what_keeps_a_volume_from_being_opened_is_told_with_its_remedy(
    tmp_path: Path, running_service: ServiceProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(VolumeMissing, match="atoll format"):
        AtollFileSystem(tmp_path / "none", skip_instance_cache=True).ls("/")
    monkeypatch.delenv("ATOLL_TOKEN", raising=False)
    address = running_service.address("none")
    with pytest.raises(TokenMissing, match="ATOLL_TOKEN"):
        AtollFileSystem(address, skip_instance_cache=True).ls("/")
    (tmp_path / "token").write_text(running_service.token)
    with pytest.raises(VolumeMissing):
        AtollFileSystem(address, token_file=tmp_path / "token", skip_instance_cache=True).ls("/")


def test_instances_share_a_volume_and_the_last_one_ends_it(tmp_path: Path) -> None:
    place = embedded_place(tmp_path)
    with place.opened() as one:
        with place.opened(asynchronous=True) as other:
            one.pipe_file("/file", b"x" * 100_000)
            assert other.open("/file").read() == b"x" * 100_000
        one.pipe_file("/file", b"y")
        with place.opened(cache_size="1GiB") as third, pytest.raises(VolumeBusy, match="a Python program"):
            third.ls("/")
    with place.opened(cache_size="1GiB") as third:
        assert third.cat_file("/file") == b"y"
    # After its end it is opened anew.
    assert one.cat_file("/file") == b"y"
    del one, other
    gc.collect()
    with place.opened(cache_size="1GiB") as third:
        assert third.cat_file("/file") == b"y"


def test_many_threads_may_open_it_at_once(tmp_path: Path) -> None:
    place = embedded_place(tmp_path)
    with place.opened() as fs:
        errors: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for step in range(20):
                    path = f"/{number}/{step}"
                    fs.pipe_file(path, b"%d" % number * 10_000)
                    assert fs.cat_file(path) == b"%d" % number * 10_000
            except BaseException as error:  # noqa: BLE001 - told by the test's own thread
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert len(fs.find("/")) == 160


def test_a_file_that_is_collected_open_is_closed(tmp_path: Path) -> None:
    place = embedded_place(tmp_path)
    with place.opened() as fs:
        file = fs.open("/file", "wb")
        file.write(b"x" * 1000)
        del file
        gc.collect()
        assert fs.cat_file("/file") == b"x" * 1000

        async def collected_on_the_loop() -> None:
            files.clear()
            gc.collect()

        from atollfs import volumes

        files = [fs.open("/file", "r+b")]
        files[0].write(b"y" * 1000)
        volumes.run_at_home(collected_on_the_loop)
        deadline = time.monotonic() + 10
        while fs.cat_file("/file") != b"y" * 1000:
            assert time.monotonic() < deadline
        # Closed: nothing of it is left to flush.
        while "open_files 0\n" not in volumes.run_at_home(lambda: _metrics(fs)):
            assert time.monotonic() < deadline


async def _metrics(fs: AtollFileSystem) -> str:
    async def look(tree: Tree) -> str:
        return tree.vfs.metrics_text()

    return await fs._ask("/", look)


def test_what_one_session_closed_another_sees(service_volume: Place) -> None:
    with service_volume.opened() as one, service_volume.opened(meta_timeout=299) as other:
        content = b""
        for number in range(10):
            writer, reader = (one, other) if number % 2 else (other, one)
            content = os.urandom(50_000 + number)
            writer.pipe_file("/shared/file", content)
            assert reader.info("/shared/file")["size"] == len(content)
            assert reader.cat_file("/shared/file") == content
            with writer.open("/shared/appended", "ab") as file:
                file.write(b"%d" % number)
            assert reader.cat_file("/shared/appended") == b"0123456789"[: number + 1]
        with one.open("/shared/file") as held:
            other.rm("/shared", recursive=True)
            assert held.read() == content
        assert not one.exists("/shared")


def checksum(arguments: tuple[AtollFileSystem, str]) -> tuple[int, int]:
    """Be one worker of a data loader."""
    fs, path = arguments
    with fs.open(path) as file:
        return os.getpid(), sum(file.read())


@pytest.mark.timeout(60)
def test_spawned_workers_read_with_sessions_of_their_own(service_volume: Place) -> None:
    with service_volume.opened() as fs:
        contents = {f"/data/{number}": os.urandom(100_000) for number in range(8)}
        fs.pipe(contents)
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            found = pool.map(checksum, [(fs, path) for path in contents], chunksize=1)
        assert [total for _, total in found] == [sum(content) for content in contents.values()]
        assert os.getpid() not in {pid for pid, _ in found}


FORKING = """
import json, os, sys
from atollfs import AtollFileSystem

def in_a_fork(work):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = str(work())
        except BaseException as error:
            text = type(error).__name__
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return text

options = json.loads(sys.argv[1])
early = AtollFileSystem(**options, skip_instance_cache=True)
with AtollFileSystem(**options) as fs:
    file = fs.open("/forked", "wb")
    file.write(b"the parent's")
    found = [
        in_a_fork(lambda: fs.ls("/")),
        in_a_fork(lambda: early.ls("/")),
        in_a_fork(file.flush),
        in_a_fork(file.raw.close),
        in_a_fork(lambda: "token" in options and AtollFileSystem(**options).ls("/", detail=False)),
    ]
    file.close()
    found.append(fs.cat_file("/forked").decode())
print(json.dumps(found))
"""


@pytest.mark.parametrize("kind", ["embedded", "service"])
def test_a_forked_process_is_refused_and_harms_nothing(
    kind: str, tmp_path: Path, running_service: ServiceProcess
) -> None:
    # In a process of its own: this one has threads that a fork would leave behind.
    place = embedded_place(tmp_path) if kind == "embedded" else service_place(running_service, tmp_path)
    refused = NotAfterFork.__name__
    assert json.loads(run_python(FORKING, json.dumps(place.options))) == [
        refused,
        refused,
        refused,
        "None",
        "['/forked']" if kind == "service" else "False",
        "the parent's",
    ]


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_service_that_is_away_for_two_seconds_shows_as_a_pause(tmp_path: Path, how: str) -> None:
    with service(tmp_path) as running:
        place = service_place(running, tmp_path)
        with place.opened() as fs:
            content = os.urandom(12 * MIB)
            fs.pipe_file("/read", content)

            def outage() -> None:
                if how == "killed":
                    running.kill()
                    time.sleep(2)
                    running.start()
                else:
                    os.kill(running.pid, signal.SIGSTOP)
                    time.sleep(2)
                    os.kill(running.pid, signal.SIGCONT)

            with fs.open("/read") as reading, fs.open("/written", "wb") as writing:
                assert reading.read(MIB) == content[:MIB]
                writing.write(content[:MIB])
                away = threading.Thread(target=outage)
                away.start()
                writing.write(content[MIB:])
                began = time.monotonic()
                fs.pipe_file("/between", b"x")
                assert reading.read() == content[MIB:]
                away.join()
            assert fs.cat_file("/written") == content
            assert fs.cat_file("/between") == b"x"
            assert time.monotonic() - began < 30


def test_an_explicit_end_flushes_what_is_open(tmp_path: Path) -> None:
    place = embedded_place(tmp_path)
    fs = AtollFileSystem(**place.options, skip_instance_cache=True)
    file = fs.open("/file", "wb", block_size=10)
    file.write(b"x" * 1000)
    fs.close()
    assert fs.cat_file("/file") == b"x" * 1000
    with pytest.raises(OSError, match="the volume was closed"):
        file.write(b"y" * 1000)
    file.write(b"y")  # into the buffer
    with pytest.raises(OSError, match="the volume was closed"):
        file.close()
    fs.close()
    assert json.loads(command("status", place.options["address"], "--json"))
