"""S3, GCS and Azure (and what speaks their protocols) through obstore.

Owns how a URL and an environment become an obstore store, and the one table that turns its errors into ours. Must not retry:
obstore's own retries are off (`max_retries` 0; seen to send one request for every kind of failure), because one policy with one
budget is `RetryingStore`'s. obstore drops a request whose task is cancelled.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn, cast

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    InvalidPathError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
    UnknownConfigurationKeyError,
)
from obstore.store import AzureStore, GCSStore, S3Store

from chunkstore.buckets import ObjectInfo, check_delete, check_key, check_prefix
from chunkstore.buckets.probe import probe_store
from chunkstore.buckets.url import BucketUrl, check_endpoint
from chunkstore.errors import (
    AtollError,
    BucketDenied,
    BucketFull,
    BucketInvalid,
    BucketUnavailable,
    ObjectExists,
    ObjectMissing,
)
from chunkstore.geometry import Buffer

if TYPE_CHECKING:
    from obstore.store import AzureConfig, ClientConfig, GCSConfig, RetryConfig, S3Config

DEFAULT_REGION: Final = "us-east-1"
# Sent along with each PUT, for the server to compare with the bytes that came. SeaweedFS takes an altered body without it,
# although it signs the same SHA-256 (tried); with it, it answers BadDigest. obstore computes it once for both: no cost seen.
_CHECKSUM: Final = "SHA256"
_CONNECT_TIMEOUT: Final = timedelta(seconds=5)
# Below the 20 s after which S3 closes an idle connection, so that few requests meet one that is being closed.
_IDLE_TIMEOUT: Final = timedelta(seconds=15)
_LISTED_AT_ONCE: Final = 1000

_KEYS_REMEDY: Final = {
    "s3": "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and what that key may do",
    "gs": "check GOOGLE_APPLICATION_CREDENTIALS, and what that account may do",
    "az": "check AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, and what that key may do",
}
# Variables handed to obstore by name. What else its provider chain knows (roles, metadata services) it finds by itself.
_S3_VARIABLES: Final = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_SKIP_SIGNATURE",
    "AWS_REQUEST_PAYER",
    "AWS_SERVER_SIDE_ENCRYPTION",
    "AWS_SSE_KMS_KEY_ID",
)
_GS_VARIABLES: Final = (
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_SKIP_SIGNATURE",
)
_AZ_VARIABLES: Final = (
    "AZURE_STORAGE_ACCOUNT_NAME",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_SAS_KEY",
    "AZURE_STORAGE_CLIENT_ID",
    "AZURE_STORAGE_CLIENT_SECRET",
    "AZURE_STORAGE_TENANT_ID",
    "AZURE_SKIP_SIGNATURE",
)

_STATUS: Final = re.compile(r"status code: (\d{3})")
_SERVER_CODE: Final = re.compile(r"<Code>([^<]{1,80})</Code>")
_SYSTEM_MESSAGE: Final = re.compile(r'message: "([^"]{1,120})"')
# Codes that some servers send with a status that does not say it.
_PASSING_CODES: Final = frozenset(
    {
        "BadDigest",
        "IncompleteBody",
        "InternalError",
        "OperationAborted",
        "RequestTimeout",
        "SlowDown",
        "ServiceUnavailable",
        "TooManyRequests",
        "XAmzContentSHA256Mismatch",
    }
)
_NO_BUCKET_CODES: Final = frozenset({"NoSuchBucket", "ContainerNotFound"})
_FULL_CODES: Final = frozenset({"QuotaExceeded", "InsufficientCapacity", "XMinioStorageFull"})
_CLOCK_CODES: Final = frozenset({"RequestTimeTooSkewed", "RequestExpired"})
_CERTIFICATE: Final = re.compile(r"certificate|UnknownIssuer|NotValidForName")


class CloudStore:
    """Keep objects in a bucket of S3, GCS or Azure."""

    def __init__(self, place: BucketUrl, *, env: Mapping[str, str], attempt_timeout_s: float) -> None:
        """Prepare a client; sends nothing. BucketDenied or BucketInvalid where `env` is not enough for that."""
        self._place = place
        try:
            self._store = _open(place, env=env, attempt_timeout_s=attempt_timeout_s)
        except (BaseError, ValueError) as error:
            raise BucketInvalid(f"bucket {place}: {_first_line(error)}") from error

    def __str__(self) -> str:
        """Name the bucket for messages."""
        return f"bucket {self._place}"

    async def get(
        self, key: str, *, start: int | None = None, end: int | None = None, timeout_s: float | None = None
    ) -> bytes | memoryview:
        """Return the bytes `[start, end)` of an object, without a copy. obstore checks them against Content-Length."""
        check_key(key)
        first = start or 0
        if end is not None and end <= first:
            return b""
        try:
            if end is not None:
                return memoryview(await obstore.get_range_async(self._store, key, start=first, end=end))
            answer = await obstore.get_async(self._store, key, options={"range": {"offset": first}} if first else None)
            return memoryview(await answer.bytes_async())
        except (BaseError, OSError) as error:
            if _status(error) == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return b""
            self._translate(error, key)

    async def put(self, key: str, data: Buffer, *, if_absent: bool = False, timeout_s: float | None = None) -> None:
        """Store an object with one PUT. On S3 the server refuses bytes that were altered on the way (retryable)."""
        check_key(key)
        mode: Literal["create", "overwrite"] = "create" if if_absent else "overwrite"
        try:
            await obstore.put_async(self._store, key, data, mode=mode, use_multipart=False)
        except (AlreadyExistsError, PreconditionError) as error:
            if not if_absent or await self.get(key) != data:
                raise ObjectExists(f"{self}: {key}: exists with other bytes") from error
        except (BaseError, OSError) as error:
            self._translate(error, key)

    async def delete(self, keys: Sequence[str], *, timeout_s: float | None = None) -> None:
        """Delete objects: one request on S3, one per 256 on Azure, one each on GCS."""
        check_delete(keys)
        if not keys:
            return
        try:
            await obstore.delete_async(self._store, list(keys))
        except FileNotFoundError as error:
            if _server_code(error) in _NO_BUCKET_CODES:
                self._translate(error, keys[0])
            # GCS and Azure stop at the first absent one; so the others one by one.
            for key in keys:
                await self._delete_one(key)
        except (BaseError, OSError) as error:
            self._translate(error, keys[0])

    async def list(self, prefix: str = "", *, start_after: str | None = None) -> AsyncIterator[ObjectInfo]:
        """Yield the objects under a prefix, page by page."""
        stream = obstore.list(self._store, check_prefix(prefix) or None, offset=start_after, chunk_size=_LISTED_AT_ONCE)
        try:
            async for page in stream:
                for meta in page:
                    yield _info(meta)
        except (BaseError, OSError) as error:
            self._translate(error, prefix)

    async def head(self, key: str, *, timeout_s: float | None = None) -> ObjectInfo:
        """Describe an object with one HEAD."""
        try:
            return _info(await obstore.head_async(self._store, check_key(key)))
        except (BaseError, OSError) as error:
            self._translate(error, key)

    async def probe(self) -> None:
        """Prove that objects can be put, read, listed and deleted."""
        await probe_store(self)

    async def close(self) -> None:
        """Do nothing: obstore closes its connections when the store is freed."""

    @property
    def needs_location(self) -> bool:
        """Return whether creating the bucket takes its region in the body: on AWS outside of the default region."""
        return self._place.endpoint is None and self._place.region not in (None, DEFAULT_REGION)

    def presigned_put_of_bucket(self) -> str:
        """Return a URL that creates the bucket on S3 when PUT is sent to it, for a minute."""
        return obstore.sign(self._store, "PUT", "", timedelta(minutes=1))

    async def _delete_one(self, key: str) -> None:
        try:
            await obstore.delete_async(self._store, key)
        except FileNotFoundError:
            return
        except (BaseError, OSError) as error:
            self._translate(error, key)

    def _translate(self, error: BaseException, key: str) -> NoReturn:
        """Raise ours for obstore's: the one table of foreign errors."""
        raise translated(error, where=f"{self}: {key}" if key else str(self), scheme=self._place.scheme) from error


def translated(error: BaseException, *, where: str, scheme: str) -> AtollError:
    """Return our error for one of obstore's, by its class, the status of the answer and the server's code for it."""
    status, code = _status(error), _server_code(error)
    reason = _reason(error)
    if code in _CLOCK_CODES:
        return BucketDenied(f"{where}: {reason}: set this machine's clock")
    if code in _FULL_CODES or status == HTTPStatus.INSUFFICIENT_STORAGE:
        return BucketFull(f"{where}: {reason}: raise the quota there")
    if code in _NO_BUCKET_CODES:
        return BucketInvalid(f"{where}: {reason}: create the bucket first, or format with --create-bucket")
    if code in _PASSING_CODES:
        return BucketUnavailable(f"{where}: {reason}")
    if isinstance(error, FileNotFoundError):
        return ObjectMissing(f"{where}: no such object")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or status in (
        HTTPStatus.UNAUTHORIZED,
        HTTPStatus.FORBIDDEN,
    ):
        return BucketDenied(f"{where}: {reason}: {_KEYS_REMEDY[scheme]}")
    if isinstance(error, AlreadyExistsError | PreconditionError):
        return ObjectExists(f"{where}: exists")
    if isinstance(error, InvalidPathError | NotSupportedError | UnknownConfigurationKeyError):
        return BucketInvalid(f"{where}: {reason}: check the bucket's URL")
    if status is None:
        if _CERTIFICATE.search(str(error)):
            return BucketInvalid(f"{where}: {reason}: install the server's certificate authority on this machine")
        return BucketUnavailable(f"{where}: {reason}: check the endpoint, and that the server runs")
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR and status != HTTPStatus.NOT_IMPLEMENTED:
        return BucketUnavailable(f"{where}: {reason}")
    if status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS):
        return BucketUnavailable(f"{where}: {reason}")
    if status == HTTPStatus.NOT_IMPLEMENTED and scheme == "s3":
        return BucketInvalid(f"{where}: {reason}: if the server knows no checksums, set AWS_CHECKSUM_ALGORITHM=none")
    if status == HTTPStatus.NOT_FOUND:
        return BucketInvalid(f"{where}: {reason}: check the bucket's name and endpoint")
    if HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST:
        return BucketInvalid(f"{where}: {reason}: the bucket is elsewhere, name its region or endpoint in the URL")
    return BucketInvalid(f"{where}: {reason}: check the bucket's URL, its region and its endpoint")


def _open(place: BucketUrl, *, env: Mapping[str, str], attempt_timeout_s: float) -> S3Store | GCSStore | AzureStore:
    """Return obstore's store for a URL, its settings from `env`."""
    client: ClientConfig = {
        "timeout": timedelta(seconds=attempt_timeout_s),
        "connect_timeout": min(_CONNECT_TIMEOUT, timedelta(seconds=attempt_timeout_s)),
        "pool_idle_timeout": _IDLE_TIMEOUT,
    }
    retry: RetryConfig = {"max_retries": 0}
    config: dict[str, Any]
    prefix = place.prefix or None
    if place.scheme == "s3":
        config = _s3_config(place, env)
        client["allow_http"] = config.get("endpoint", "").startswith("http://")
        return S3Store(
            place.bucket, prefix=prefix, config=cast("S3Config", config), client_options=client, retry_config=retry
        )
    client["allow_http"] = (place.endpoint or "").startswith("http://")
    if place.scheme == "gs":
        config = _taken(env, _GS_VARIABLES)
        if place.endpoint:
            config["base_url"] = place.endpoint
        return GCSStore(
            place.bucket, prefix=prefix, config=cast("GCSConfig", config), client_options=client, retry_config=retry
        )
    config = _taken(env, _AZ_VARIABLES)
    if place.endpoint:
        config["endpoint"] = place.endpoint
    if place.account:
        config["azure_storage_account_name"] = place.account
    if "azure_storage_account_name" not in config:
        raise BucketDenied(f"bucket {place}: no storage account: set AZURE_STORAGE_ACCOUNT_NAME, or add ?account=NAME")
    return AzureStore(
        place.bucket, prefix=prefix, config=cast("AzureConfig", config), client_options=client, retry_config=retry
    )


def _s3_config(place: BucketUrl, env: Mapping[str, str]) -> dict[str, Any]:
    """Return obstore's settings for S3. With an endpoint of its own the keys must be in `env`: no cloud role fits there."""
    config: dict[str, Any] = _taken(env, _S3_VARIABLES)
    has_id, has_secret = "aws_access_key_id" in config, "aws_secret_access_key" in config
    endpoint = place.endpoint
    if endpoint is None and (named := env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL")):
        endpoint = check_endpoint(named, text="AWS_ENDPOINT_URL")
    is_unsigned = config.get("aws_skip_signature", "").lower() in ("1", "true", "yes", "on")
    if has_id != has_secret or (endpoint and not has_id and not is_unsigned):
        missing = "AWS_SECRET_ACCESS_KEY" if has_id else "AWS_ACCESS_KEY_ID" if has_secret else "bucket keys"
        raise BucketDenied(f"bucket {place}: no {missing}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    config["region"] = place.region or env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or DEFAULT_REGION
    if endpoint:
        config["endpoint"] = endpoint
    # Some servers refuse headers that they do not know.
    if (checksum := env.get("AWS_CHECKSUM_ALGORITHM") or _CHECKSUM).lower() != "none":
        config["checksum_algorithm"] = checksum
    # A name with dots fits no certificate for *.s3.amazonaws.com.
    config["virtual_hosted_style_request"] = endpoint is None and "." not in place.bucket
    return config


def _taken(env: Mapping[str, str], names: tuple[str, ...]) -> dict[str, Any]:
    return {name.lower(): env[name] for name in names if env.get(name)}


def _info(meta: obstore.ObjectMeta) -> ObjectInfo:
    age: timedelta = meta["last_modified"] - datetime(1970, 1, 1, tzinfo=UTC)
    # Whole microseconds: a float of seconds would lose some.
    return ObjectInfo(meta["path"], meta["size"], age // timedelta(microseconds=1) * 1000, meta["e_tag"])


def _first_line(error: BaseException) -> str:
    return str(error).split("\n", 1)[0]


def _status(error: BaseException) -> int | None:
    """Return the status of the server's answer; None where there was none."""
    found = _STATUS.search(_first_line(error))
    return int(found[1]) if found else None


def _server_code(error: BaseException) -> str | None:
    found = _SERVER_CODE.search(str(error))
    return found[1] if found else None


def _reason(error: BaseException) -> str:
    """Say in a few words what went wrong, from the answer, or from the chain of causes that obstore prints."""
    text = str(error)
    if (status := _status(error)) is not None:
        return f"HTTP {status} ({_server_code(error) or 'no details'})"
    for told, pattern in _CAUSES:
        if pattern in text:
            return told
    if found := _SYSTEM_MESSAGE.search(text):
        return found[1]
    return _first_line(error)


_CAUSES: Final = (
    ("host name not found", '"dns error"'),
    ("no answer in time", "TimedOut"),
    ("connection closed before the answer ended", "IncompleteBody"),
    ("connection closed without an answer", "IncompleteMessage"),
    ("the server's certificate is not trusted", "UnknownIssuer"),
    ("the server's certificate is for another name", "NotValidForName"),
)
