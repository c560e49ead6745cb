"""A holder and its commands on a real socket: answers, limits, slow and hostile peers, stale socket files."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from chunkstore.errors import AtollError, BucketFull
from client.control import endpoint
from client.control.caller import HolderCall, HolderLost, call_holder
from client.control.endpoint import Peer
from client.control.messages import ControlError, Items, Progress, RemoteError, Request, decode_reply, encode_request
from client.control.server import MAX_CONNECTIONS, ControlServer, Report

DEADLINE_S = 20


class Holder:
    """What a test sees of the holder's side."""

    def __init__(self, directory: Path) -> None:
        self.directory = str(directory)
        self.unexpected: list[BaseException] = []
        self.withdrawn = threading.Event()
        self.running = threading.Event()

    async def handle(self, request: Request, peer: Peer, report: Report) -> dict[str, Any]:
        if request.name == "echo":
            return {"params": request.params, "uid": peer.uid}
        if request.name == "parts":
            report.progress(Progress("working", 1, 3, "files"))
            for number in range(3):
                await report.items(Items("rows", [number] * 1000))
            await asyncio.sleep(0.5)
            return {"count": 3}
        if request.name == "flood":
            while True:
                await report.items(Items("rows", ["x" * 1000] * 1000))
        if request.name == "fail":
            raise BucketFull("the bucket is full: buy another")
        if request.name == "surprise":
            raise KeyError("a bug")
        if request.name == "disk":
            raise OSError(errno.EIO, "Input/output error", "/some/file")
        self.running.set()
        try:
            await asyncio.sleep(DEADLINE_S)
        finally:
            self.withdrawn.set()
        raise AssertionError("nobody withdrew this request")

    def call(self, name: str, params: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
        call = call_holder(self.directory)
        assert call is not None
        with call:
            return call.run(Request(name, params or {}), **options)

    def raw(self) -> socket.socket:
        connection = endpoint.connect(self.directory, timeout_s=DEADLINE_S)
        assert connection is not None
        return connection

    def error_of(self, data: bytes) -> RemoteError:
        """Send raw bytes, and nothing after them, and return the error that comes back."""
        with self.raw() as connection:
            # A holder that has read enough to refuse does not wait for the rest.
            with suppress(ConnectionError):
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
            with connection.makefile("rb") as file:
                reply = decode_reply(file.readline())
        assert isinstance(reply, RemoteError)
        return reply


@contextmanager
def holding(directory: Path, *, ask_s: float = DEADLINE_S, read_s: float = DEADLINE_S) -> Iterator[Holder]:
    """Run a holder in a thread."""
    holder = Holder(directory)
    ready = threading.Event()
    ended = asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def run() -> None:
        server = ControlServer(
            str(directory),
            holder.handle,
            unexpected=lambda _request, error: holder.unexpected.append(error),
            ask_s=ask_s,
            read_s=read_s,
        )
        async with server:
            loops.append(asyncio.get_running_loop())
            ready.set()
            await ended.wait()
            await server.close(drain_s=0.1)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert ready.wait(DEADLINE_S)
    try:
        yield holder
    finally:
        loops[0].call_soon_threadsafe(ended.set)
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


def test_a_request_is_answered_with_the_user_that_the_kernel_names(tmp_path: Path) -> None:
    with holding(tmp_path) as holder:
        assert holder.call("echo", {"a": [1, "\udcff"]}) == {"params": {"a": [1, "\udcff"]}, "uid": os.geteuid()}
        call = call_holder(holder.directory)
        assert call is not None
        with call:
            assert call.holder_pid == os.getpid()


def test_a_long_result_comes_in_parts_with_progress_in_between(tmp_path: Path) -> None:
    seen: list[Progress] = []
    with holding(tmp_path) as holder:
        result = holder.call("parts", show=seen.append)
    assert result == {"count": 3, "rows": [0] * 1000 + [1] * 1000 + [2] * 1000}
    assert seen == [Progress("working", 1, 3, "files")]


def test_errors_arrive_with_their_errno_and_code(tmp_path: Path) -> None:
    with holding(tmp_path) as holder:
        with pytest.raises(RemoteError, match="buy another") as refused:
            holder.call("fail")
        assert (refused.value.code, refused.value.errno) == ("bucket-full", errno.ENOSPC)
        assert not holder.unexpected


def test_unexpected_exceptions_are_logged_once_and_answered_in_one_line(tmp_path: Path) -> None:
    with holding(tmp_path) as holder:
        with pytest.raises(RemoteError, match="unexpected KeyError"):
            holder.call("surprise")
        with pytest.raises(RemoteError, match="/some/file") as refused:
            holder.call("disk")
        assert refused.value.errno == errno.EIO
        assert [type(error) for error in holder.unexpected] == [KeyError, OSError]


def test_the_socket_is_the_users_alone_and_goes_with_the_holder(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with holding(tmp_path):
            status = (tmp_path / "holder.sock").stat()
            assert stat.S_ISSOCK(status.st_mode)
            assert stat.S_IMODE(status.st_mode) == 0o600
    finally:
        os.umask(before)
    assert list(tmp_path.iterdir()) == []
    assert call_holder(str(tmp_path)) is None


def test_without_a_volume_there_is_no_holder(tmp_path: Path) -> None:
    assert call_holder(str(tmp_path / "absent")) is None
    (tmp_path / "file").write_bytes(b"")
    assert call_holder(str(tmp_path / "file")) is None


def test_a_directory_deeper_than_a_socket_address_is_reached(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 200) / ("e" * 200)
    deep.mkdir(parents=True)
    with holding(deep) as holder:
        assert holder.call("echo")["params"] == {}


def test_the_socket_that_a_killed_holder_left_is_replaced(tmp_path: Path) -> None:
    endpoint.listen(str(tmp_path)).close()
    assert (tmp_path / "holder.sock").exists()
    assert call_holder(str(tmp_path)) is None
    with holding(tmp_path) as holder:
        assert holder.call("echo")["params"] == {}


def test_a_file_that_is_no_socket_is_no_holder_and_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "holder.sock").write_bytes(b"left over")
    assert call_holder(str(tmp_path)) is None
    with holding(tmp_path) as holder:
        assert holder.call("echo")["params"] == {}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"version":1,"request":"echo","params":{}}',
        b'{"version":99,"request":"echo","params":{}}\n',
        b"[" * 50_000 + b"\n",
        b"x" * 200_000,
        b"\0" * 70_000 + b"\n",
    ],
)
def test_malformed_and_oversized_requests_are_refused_and_harm_nobody(tmp_path: Path, data: bytes) -> None:
    with holding(tmp_path) as holder:
        assert holder.error_of(data).code == "control"
        assert holder.call("echo")["params"] == {}
        assert not holder.unexpected


def test_a_peer_that_asks_nothing_is_told_so_and_dropped(tmp_path: Path) -> None:
    with holding(tmp_path, ask_s=0.1) as holder, holder.raw() as connection:
        connection.sendall(b'{"version":1,')
        file = connection.makefile("rb")
        reply = decode_reply(file.readline())
        assert isinstance(reply, RemoteError)
        assert "no request within" in reply.message
        assert file.read() == b""


def test_a_peer_that_reads_nothing_is_dropped_and_others_are_served(tmp_path: Path) -> None:
    with holding(tmp_path, read_s=0.2) as holder, holder.raw() as connection:
        connection.sendall(encode_request(Request("flood", {})))
        assert holder.call("echo")["params"] == {}
        # Reads only what fitted into buffers, then the end: the holder gave up.
        threading.Event().wait(1.0)
        received = 0
        while data := connection.recv(1 << 20):
            received += len(data)
        assert received < 64 << 20


def test_a_command_that_hangs_up_withdraws_its_request(tmp_path: Path) -> None:
    with holding(tmp_path) as holder:
        with holder.raw() as connection:
            connection.sendall(encode_request(Request("wait", {})))
            assert holder.running.wait(DEADLINE_S)
        assert holder.withdrawn.wait(DEADLINE_S)


def test_an_ending_holder_withdraws_what_runs_and_the_command_is_told(tmp_path: Path) -> None:
    with ExitStack() as stack:
        lost: list[BaseException] = []

        def ask(holder: Holder) -> None:
            try:
                holder.call("wait")
            except AtollError as error:
                lost.append(error)

        with holding(tmp_path) as holder:
            thread = threading.Thread(target=ask, args=(holder,))
            thread.start()
            stack.callback(thread.join, DEADLINE_S)
            assert holder.running.wait(DEADLINE_S)
        thread.join(DEADLINE_S)
        assert [type(error) for error in lost] == [HolderLost]


def test_more_commands_than_the_limit_are_told_to_come_back(tmp_path: Path) -> None:
    with holding(tmp_path) as holder, ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS):
            stack.enter_context(holder.raw())
        with pytest.raises(RemoteError, match="too many") as refused:
            holder.call("echo")
        assert refused.value.retryable


def test_a_silent_holder_is_given_up(tmp_path: Path) -> None:
    with endpoint.listen(str(tmp_path)):
        connection = endpoint.connect(str(tmp_path), timeout_s=1)
        assert connection is not None
        with HolderCall(connection, silence_s=0.05) as call, pytest.raises(HolderLost, match="silent"):
            call.run(Request("echo", {}))


def test_a_holder_of_another_version_is_an_error_that_says_so(tmp_path: Path) -> None:
    with endpoint.listen(str(tmp_path)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b'{"version":7,"result":{}}\n')

        thread = threading.Thread(target=answer)
        thread.start()
        call = call_holder(str(tmp_path))
        assert call is not None
        with call, pytest.raises(ControlError, match="version 7"):
            call.run(Request("echo", {}))
        thread.join(DEADLINE_S)


def test_another_user_is_refused_even_where_the_socket_is_open_to_all(tmp_path: Path) -> None:
    """Needs root, to become another user."""
    ours, theirs = socket.socketpair()
    with holding(tmp_path) as holder, ours, theirs:
        tmp_path.chmod(0o755)
        (tmp_path / "holder.sock").chmod(0o666)
        child = os.fork()
        if child == 0:
            # In the child nothing but system calls: the parent has threads.
            code = 1
            try:
                os.chdir(tmp_path)
                os.setresuid(65534, 65534, 65534)
                connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                connection.connect("holder.sock")
                # Refused as soon as it connected: this may come too late.
                with suppress(ConnectionError):
                    connection.sendall(encode_request(Request("echo", {})))
                theirs.sendall(connection.makefile("rb").readline())
                code = 0
            finally:
                os._exit(code)
        theirs.close()
        with ours.makefile("rb") as file:
            reply = decode_reply(file.readline())
        os.waitpid(child, 0)
        assert isinstance(reply, RemoteError)
        assert reply.errno == errno.EACCES
        assert holder.call("echo")["params"] == {}
