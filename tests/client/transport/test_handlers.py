"""The handlers without a mount: every error becomes one answer, what is unexpected is logged once."""

from __future__ import annotations

import asyncio
import errno as E
from pathlib import Path
from typing import Any

import pyfuse3
import pytest
import structlog
from structlog.testing import capture_logs

from chunkstore.errors import AtollError, BucketDenied
from client.transport.event_loop import EventLoop
from client.transport.pyfuse3 import _HANDLERS, Operations, _escaped, _Option
from client.vfs.vfs import Vfs
from metasvc.errors import FsError
from metasvc.model import Ino, Inode
from tests.client.vfs.volumes import Place, VfsVolume


class Broken(Vfs):
    """A vfs whose getattr raises what it is told."""

    error: BaseException

    async def getattr(self, ino: Ino) -> Inode:
        raise self.error


def operations_on(volume: VfsVolume, error: BaseException) -> Operations:
    vfs = Broken(volume.meta, volume.chunks, log=structlog.get_logger())
    vfs.error = error
    return Operations(vfs, loop=EventLoop(), on_init=lambda: None, log=structlog.get_logger())


@pytest.mark.parametrize(
    ("error", "errno", "logged"),
    [
        # GETATTR asks for an inode by number: the name that led to it is old.
        (FsError(E.ENOENT), E.ESTALE, False),
        (FsError(E.EDQUOT), E.EDQUOT, False),
        (BucketDenied("no key"), E.EACCES, False),
        (AtollError("?"), E.EIO, False),
        (OSError(E.ENOSPC, "no space on the cache disk"), E.ENOSPC, True),
        (KeyError("a bug"), E.EIO, True),
        (AssertionError(), E.EIO, True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_every_error_is_answered_with_an_errno_and_logged_once_if_it_is_not_expected(
    tmp_path: Path, error: BaseException, errno: int, *, logged: bool
) -> None:
    async def scenario() -> None:
        async with Place(tmp_path).opened() as volume:
            operations = operations_on(volume, error)
            with capture_logs() as logs, pytest.raises(pyfuse3.FUSEError) as answer:
                await operations.getattr(1, None)  # type: ignore[arg-type]
            assert answer.value.errno == errno
            assert len(logs) == logged
            metrics = operations._vfs.metrics.operation("GETATTR")
            assert (metrics.count, metrics.errors) == (1, 1)
            if logged and not isinstance(error, OSError):
                assert logs[0]["exc_info"] is error, "with its traceback"

    asyncio.run(scenario())


def test_a_name_that_is_not_there_is_an_answer_that_a_kernel_may_keep(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with Place(tmp_path).opened() as volume:
            operations = Operations(volume.vfs, loop=EventLoop(), on_init=lambda: None, log=structlog.get_logger())
            absent: Any = await operations.lookup(1, b"none", None)  # type: ignore[arg-type]
            assert absent.st_ino == 0
            assert absent.entry_timeout == volume.vfs.options.negative_timeout_s
            with pytest.raises(pyfuse3.FUSEError) as answer:
                await operations.lookup(1, b"x" * 256, None)  # type: ignore[arg-type]
            assert answer.value.errno == E.ENAMETOOLONG

    asyncio.run(scenario())


def test_every_request_of_pyfuse3_that_a_file_system_answers_is_counted() -> None:
    async_methods = {
        name for name in dir(pyfuse3.Operations) if asyncio.iscoroutinefunction(getattr(pyfuse3.Operations, name))
    }
    # poll(2) is answered by the kernel itself after the first ENOSYS.
    assert set(_HANDLERS.values()) == async_methods - {"poll"}


def test_mount_options_may_hold_any_characters() -> None:
    assert _escaped("a,b\\c") == "a\\,b\\\\c"
    assert _Option("fsname=/größe\udcff").encode("us-ascii") == b"fsname=/gr\xc3\xb6\xc3\x9fe\xff"
