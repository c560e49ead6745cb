"""The Python way in: volumes as an fsspec file system, `atoll://`, without FUSE and without a daemon.

    import fsspec, pandas
    pandas.read_parquet("atoll://host:7070/acme/data/train.parquet")              # token from ATOLL_TOKEN
    fs = fsspec.filesystem("atoll", address="/path/to/vol")                       # an embedded volume
    fs.pipe_file("/notes", b"text")

Owns nothing but the names that users import. Importing it loads no native library; the first operation does. The modules,
from the bottom: `location` (URLs and options), `permissions` (rwx), `tree` (POSIX by path over client.vfs), `volumes` (what
is open in this process, from its opening to its end), `file` (file objects), `filesystem` (fsspec's methods).
"""

from __future__ import annotations

from atollfs.filesystem import AtollFileSystem

__all__ = ["AtollFileSystem"]
