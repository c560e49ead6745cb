"""``stats``: the counters of a volume's holder, as Prometheus text.

Owns which parts are joined and their names: ``atoll_fuse_*`` from the vfs, ``atoll_chunk_*``, ``atoll_bucket_*``,
``atoll_meta_*``. The virtual file ``.atoll/stats`` shows the same text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from client.admin.asking import Asked
from client.control.messages import JsonObject
from client.volume import OpenVolume


def stats_text(volume: OpenVolume) -> str:
    """Return all metrics of the process that holds a volume. Never blocks."""
    lines: list[str] = []
    mounting = volume.mounting
    if mounting is not None:
        lines.append(mounting.metrics_text().rstrip("\n"))
        lines += _family("atoll_chunk_", mounting.chunks.stats())
    lines += _bucket_lines(volume)
    lines += _family("atoll_meta_", volume.meta_counters())
    return "\n".join(lines) + "\n"


def _family(prefix: str, values: dict[str, int] | dict[str, int | float]) -> Iterator[str]:
    for name, value in sorted(values.items()):
        kind = "counter" if name.endswith("_total") else "gauge"
        yield f"# TYPE {prefix}{name} {kind}"
        yield f"{prefix}{name} {value}"


def _bucket_lines(volume: OpenVolume) -> Iterator[str]:
    counters = volume.bucket_counters()
    fields = ("requests", "retries", "errors", "bytes", "seconds")
    for field in fields if counters else ():
        yield f"# TYPE atoll_bucket_{field}_total counter"
        for verb, tally in sorted(counters.items()):
            yield f'atoll_bucket_{field}_total{{verb="{verb}"}} {getattr(tally, field)}'


def parse_metrics(text: str) -> JsonObject:
    """Return Prometheus text as one object: each sample's name, labels included, to its value."""
    samples: JsonObject = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        name, _, value = line.rpartition(" ")
        number = float(value)
        samples[name] = int(number) if math.isfinite(number) and number.is_integer() else number
    return samples


async def stats(asked: Asked) -> JsonObject:
    """Return the metrics, as lines of text."""
    asked.params.done()
    await asked.items("lines", stats_text(asked.volume).splitlines())
    return {"lines": []}
