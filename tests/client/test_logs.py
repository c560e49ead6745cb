"""The log of a mount: one line for each event, whoever logs it."""

from __future__ import annotations

import asyncio
import json
import logging
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from client import logs, request_ids


@pytest.fixture
def root_handlers() -> Iterator[None]:
    """Give the process's logging back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(capture=False)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_every_event_is_one_line_that_names_the_volume(
    tmp_path: Path, root_handlers: None, log_format: logs.LogFormat
) -> None:
    path = tmp_path / "log"
    log = logs.configure(str(path), volume="/srv/my vol", log_format=log_format)
    log.info("mounted", pid=7, name=b"a\xffb", text='two\nlines and a "quote"')
    logging.getLogger("chunkstore.buckets").warning("the bucket says %s", "no\nreally")
    try:
        raise ValueError("a bug\nwith two lines")
    except ValueError:
        log.exception("failed unexpectedly", inode=3)
    log.debug("not shown")
    lines = path.read_text().splitlines()
    assert len(lines) == 3
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    if log_format == "json":
        first, second, third = (json.loads(line) for line in lines)
        assert (first["event"], first["level"], first["pid"], first["volume"]) == ("mounted", "info", 7, "/srv/my vol")
        assert (second["event"], second["volume"]) == ("the bucket says no\nreally", "/srv/my vol")
        assert "Traceback" in third["exception"]
    else:
        assert 'volume="/srv/my vol"' in lines[0]
        assert " INFO mounted pid=7 " in lines[0]
        assert "WARNING the bucket says no\\nreally" in lines[1]
        assert "Traceback" in lines[2]
        assert "inode=3" in lines[2]


async def test_a_line_names_the_request_that_it_was_logged_for_also_in_tasks_of_that_request(
    tmp_path: Path, root_handlers: None
) -> None:
    path = tmp_path / "log"
    log = logs.configure(str(path), volume="v")
    told = asyncio.Event()

    async def later(text: str) -> None:
        await told.wait()
        log.info(text)
        logging.getLogger("chunkstore").warning("library %s", text)

    async def work(operation: str) -> tuple[str, asyncio.Task[None]]:
        request = request_ids.begin(operation)
        log.info(f"during {operation}")
        return request, asyncio.create_task(later(f"after {operation}"))

    log.info("outside")
    answers = await asyncio.gather(*(work(operation) for operation in ("READ", "WRITE")))
    told.set()
    await asyncio.gather(*(task for _, task in answers))
    lines = path.read_text().splitlines()
    assert not any("request=" in line for line in lines if "outside" in line)
    for request, operation in zip((answer[0] for answer in answers), ("READ", "WRITE"), strict=True):
        assert sum(operation in line.split("request=")[0] for line in lines) == 3
        assert sum(line.endswith(f"request={request}") for line in lines) == 3


def test_a_log_that_grew_too_long_is_put_aside(
    tmp_path: Path, root_handlers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "MAX_LOG_BYTES", 10_000)
    log = logs.configure(str(tmp_path / "log"), volume="v")
    for number in range(300):
        log.info("event", number=number)
    assert {path.name for path in tmp_path.iterdir()} == {"log", "log.1"}
    assert (tmp_path / "log").stat().st_size <= 10_000
    assert "number=299" in (tmp_path / "log").read_text()


def test_the_log_does_not_bring_rich_into_the_daemon() -> None:
    code = "import sys, client.logs; assert 'rich' not in sys.modules; import rich"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
