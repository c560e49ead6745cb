"""The one error family of AtollFS, and its leaves for bytes and buckets.

Owns the three things every edge needs of an error: `errno` (what the kernel is answered), `code` (stable, kebab-case; what
the wire and `--json` carry) and `retryable` (whether the same call may succeed later without a change by the user).
Must not know libraries: foreign errors are translated where they are caught, in one table per driver.

    AtollError
    ├── ObjectMissing       EIO              object-missing       the bucket has no such object
    ├── ObjectCorrupt       EIO              object-corrupt       bytes are not those that the writer committed
    ├── FormatUnsupported   EPROTONOSUPPORT  format-unsupported   written by a newer version
    ├── BucketUnavailable   EIO              bucket-unavailable   no good answer within the budget; retryable
    ├── BucketDenied        EACCES           bucket-denied        missing, wrong or too weak keys
    ├── BucketInvalid       EINVAL           bucket-invalid       bad URL, no such bucket or directory
    ├── BucketFull          ENOSPC           bucket-full          the directory's file system or the provider's quota is full
    ├── ObjectExists        EEXIST           object-exists        put with if_absent found other bytes
    ├── CacheFull           ENOSPC           cache-full           no room for images, and nothing may be evicted
    └── metasvc.errors.FsError               (the errors of POSIX calls; defined there)

The text of an error is one line that ends with the remedy where the user has one.
"""

from __future__ import annotations

import errno as _errno


class AtollError(Exception):
    """Carry an errno, a stable code, whether a repeat may help, and one line with the remedy.

    Leaves set the three as class attributes; an instance may narrow `errno` or `retryable` by keyword.
    """

    errno: int = _errno.EIO
    code: str = "internal"
    retryable: bool = False

    def __init__(self, message: str, *, errno: int | None = None, retryable: bool | None = None) -> None:
        """Take the text of the error; line breaks in it become spaces, so that it stays one line in any log."""
        self.message: str = " ".join(message.split()) if "\n" in message or "\r" in message else message
        super().__init__(self.message)
        if errno is not None:
            self.errno = errno
        if retryable is not None:
            self.retryable = retryable

    def __str__(self) -> str:
        """Return the one line."""
        return self.message


class ObjectMissing(AtollError):
    """Say that the bucket has no object of that key."""

    errno = _errno.EIO
    code = "object-missing"


class ObjectCorrupt(AtollError):
    """Say that stored bytes are not the bytes that the writer committed, and what differs."""

    errno = _errno.EIO
    code = "object-corrupt"


class FormatUnsupported(AtollError):
    """Say that something persistent was written by a newer version, which this one refuses to guess at."""

    errno = _errno.EPROTONOSUPPORT
    code = "format-unsupported"


class BucketUnavailable(AtollError):
    """Say that the bucket gave no good answer within the budget of time and retries."""

    errno = _errno.EIO
    code = "bucket-unavailable"
    retryable = True


class BucketDenied(AtollError):
    """Say that the bucket refuses these credentials, or that there are none."""

    errno = _errno.EACCES
    code = "bucket-denied"


class BucketInvalid(AtollError):
    """Say that a bucket URL cannot be meant, or names a bucket or directory that does not exist."""

    errno = _errno.EINVAL
    code = "bucket-invalid"


class BucketFull(AtollError):
    """Say that the bucket takes no more bytes: its file system is full or a quota of the provider is spent."""

    errno = _errno.ENOSPC
    code = "bucket-full"


class ObjectExists(AtollError):
    """Say that a put with `if_absent` found an object with other bytes under its key."""

    errno = _errno.EEXIST
    code = "object-exists"


class CacheFull(AtollError):
    """Say that no image can grow: the cache is at its bound and all that is in it is pinned or not yet uploaded."""

    errno = _errno.ENOSPC
    code = "cache-full"
