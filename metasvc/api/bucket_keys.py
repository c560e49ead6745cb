"""The keys of a bucket as they travel and are kept: variables of the environment, by the names that providers gave them.

Owns which variables belong to which kind of bucket. None of them names a file: what is kept in one place must not open files of
another. Must not know drivers, nor where keys are kept.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from typing import Final

from chunkstore.errors import AtollError

__all__ = ["KEYS_OF", "BucketKeysInvalid", "check_keys", "keys_in"]

KEYS_OF: Final[Mapping[str, tuple[str, ...]]] = {
    "s3": (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_REQUEST_PAYER",
        "AWS_SERVER_SIDE_ENCRYPTION",
        "AWS_SSE_KMS_KEY_ID",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_ENDPOINT_URL_S3",
        "AWS_ENDPOINT_URL",
        "AWS_CHECKSUM_ALGORITHM",
    ),
    "gs": ("GOOGLE_SERVICE_ACCOUNT_KEY",),
    "az": (
        "AZURE_STORAGE_ACCOUNT_NAME",
        "AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_STORAGE_ACCESS_KEY",
        "AZURE_STORAGE_SAS_TOKEN",
        "AZURE_STORAGE_SAS_KEY",
        "AZURE_STORAGE_CLIENT_ID",
        "AZURE_STORAGE_CLIENT_SECRET",
        "AZURE_STORAGE_TENANT_ID",
    ),
}
"""By the scheme of the bucket's URL."""
_SECRETS: Final[Mapping[str, tuple[str, ...]]] = {
    "s3": ("AWS_SECRET_ACCESS_KEY",),
    "gs": ("GOOGLE_SERVICE_ACCOUNT_KEY",),
    "az": (
        "AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_STORAGE_ACCESS_KEY",
        "AZURE_STORAGE_SAS_TOKEN",
        "AZURE_STORAGE_SAS_KEY",
        "AZURE_STORAGE_CLIENT_SECRET",
    ),
}
_GOOGLE_FILES: Final = ("GOOGLE_SERVICE_ACCOUNT", "GOOGLE_APPLICATION_CREDENTIALS")
_MAX_BYTES: Final = 16 * 1024


class BucketKeysInvalid(AtollError):
    """Say why variables are no keys of a bucket. Never has a value of one in it."""

    code = "bad-keys"
    errno = errno.EINVAL


def keys_in(bucket_url: str, env: Mapping[str, str]) -> dict[str, str]:
    """Return the keys of a bucket that an environment has; empty where it has none, as for a directory.

    Of Google's, what the named file has. BucketKeysInvalid for such a file that cannot be read.
    """
    scheme = bucket_url.partition("://")[0]
    found = {name: env[name] for name in KEYS_OF.get(scheme, ()) if env.get(name)}
    if scheme == "gs" and not found:
        for name in _GOOGLE_FILES:
            if env.get(name):
                found["GOOGLE_SERVICE_ACCOUNT_KEY"] = _service_account(name, env[name])
                break
    return found if any(name in found for name in _SECRETS.get(scheme, ())) else {}


def _service_account(name: str, path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_MAX_BYTES)
        kind = json.loads(text).get("type")
    except (OSError, ValueError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no JSON object"
        raise BucketKeysInvalid(f"the file of {name}: {reason}: name that of a service account") from error
    if kind != "service_account":
        raise BucketKeysInvalid(f"the file of {name} is of no service account: only such a key can be given away")
    return text


def check_keys(bucket_url: str, keys: Mapping[str, str]) -> dict[str, str]:
    """Return keys that somebody sent, if they can be those of the bucket. BucketKeysInvalid."""
    scheme = bucket_url.partition("://")[0]
    allowed = KEYS_OF.get(scheme, ())
    strange = sorted(name for name in keys if name not in allowed)
    if not allowed:
        raise BucketKeysInvalid(f"a bucket {scheme}:// has no keys")
    if strange:
        raise BucketKeysInvalid(f"{strange[0][:80]!r} is no key of a bucket {scheme}://")
    if not any(keys.get(name) for name in _SECRETS[scheme]):
        raise BucketKeysInvalid(f"no secret is among the keys: set {' or '.join(_SECRETS[scheme])}")
    if sum(len(name) + len(value) for name, value in keys.items()) > _MAX_BYTES:
        raise BucketKeysInvalid(f"the keys have more than {_MAX_BYTES} bytes")
    return dict(keys)
