"""``dump``: the metadata of the volume as a stream, handed to the command in parts of its result.

Owns how the bytes travel: in base64, for the language of the control socket is JSON. Who asked checks that they are whole.
"""

from __future__ import annotations

import base64
import time
from contextlib import aclosing
from typing import Final

from client.admin.asking import Asked
from client.control.messages import Items, JsonObject

PART_BYTES: Final = 2 << 20
"""Of the stream in one message: well below the limit of a message."""


async def dump(asked: Asked) -> JsonObject:
    """Hand over the bytes of a dump as the rows of ``parts``, in order. One trip to the store for each page of a table."""
    asked.params.done()
    rows = 0
    began_s = time.monotonic()
    asked.progress("dumping")
    async with aclosing(asked.volume.admin.dump()) as parts:
        async for part in parts:
            for start in range(0, len(part.data), PART_BYTES):
                data = base64.b64encode(part.data[start : start + PART_BYTES]).decode("ascii")
                await asked.report.items(Items("parts", [data]))
            rows += part.rows
            rate = rows / max(1e-3, time.monotonic() - began_s)
            table = f" {part.table}" if part.table else ""
            asked.progress(f"dumping{table}, {rate:,.0f} rows/s", rows, unit="rows")
    return {"rows": rows}
