"""The log of a mount: one line for each event, as key=value or JSON, in a file beside the cache.

Owns the configuration of structlog and of the standard library's logging (which the chunk store and libraries use): both go
the same way, and every line names the volume, and the request that was worked on if there was one. Must not know who logs.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
from collections.abc import MutableMapping
from typing import Any, Final, Literal

# structlog imports rich for a console renderer that a daemon never shows: 60 ms of the start and 5 MiB for good.
_BLOCKED: Final = "rich"
_is_blocking = _BLOCKED not in sys.modules
if _is_blocking:
    sys.modules[_BLOCKED] = None  # type: ignore[assignment]
import structlog  # noqa: E402

if _is_blocking:
    del sys.modules[_BLOCKED]

from client import request_ids  # noqa: E402

LogFormat = Literal["text", "json"]

MAX_LOG_BYTES: Final = 32 << 20
"""Then the file is renamed to ``….log.1``, replacing the one before."""


class OwnerOnlyFile(logging.handlers.RotatingFileHandler):
    """A log file that only its user reads: it has names of files."""

    def _open(self) -> Any:
        return open(
            self.baseFilename,
            self.mode,
            encoding="utf-8",
            errors="backslashreplace",
            opener=lambda path, flags: os.open(path, flags | os.O_CLOEXEC, 0o600),
        )


def configure(path: str | None, *, volume: str, log_format: LogFormat = "text") -> Any:
    """Send all logging to a file (None: stderr) and return the logger of the mount. OSError if it cannot be written."""

    def say_where(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        event.setdefault("volume", volume)
        request = request_ids.current.get()
        if request:
            event.setdefault("request", request)
        return event

    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        say_where,
        structlog.processors.format_exc_info,
    ]
    handler: logging.Handler = (
        logging.StreamHandler() if path is None else OwnerOnlyFile(path, maxBytes=MAX_LOG_BYTES, backupCount=1)
    )
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _renderer(log_format)],
        )
    )
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    # Its INFO and DEBUG tell of every request.
    logging.getLogger("pyfuse3").setLevel(logging.WARNING)
    logging.captureWarnings(capture=True)
    structlog.configure(
        processors=[
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    return structlog.get_logger("atoll")


def _renderer(log_format: LogFormat) -> Any:
    if log_format == "json":
        return structlog.processors.JSONRenderer(sort_keys=False)
    return text_line


def text_line(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> str:
    """Return ``time level event key=value …`` on one line: values with blanks, quotes or line breaks are quoted and escaped."""
    head = [str(event.pop("timestamp", "")), str(event.pop("level", "")).upper(), _bare(str(event.pop("event", "")))]
    return " ".join(head + [f"{key}={_quoted(value)}" for key, value in event.items()])


def _bare(text: str) -> str:
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def _quoted(value: Any) -> str:
    text = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
    if text and text.isprintable() and not any(character in ' "=' for character in text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in escaped) + '"'
