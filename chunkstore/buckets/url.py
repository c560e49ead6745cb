"""Bucket URLs: what users write after `--bucket`, read once, and spelled back in messages.

Owns the grammar of DESIGN.md section 7. Must not know drivers or credentials: a URL never carries a secret.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, cast
from urllib.parse import unquote, urlsplit

from chunkstore.errors import BucketInvalid

Scheme = Literal["s3", "gs", "az", "file"]

_QUERY_KEYS: Final[dict[str, tuple[str, ...]]] = {
    "s3": ("endpoint", "region"),
    "gs": ("endpoint",),
    "az": ("endpoint", "account"),
    "file": (),
}
_EXAMPLES: Final = "s3://bucket/prefix?endpoint=http://host:port&region=NAME, gs://bucket, az://container, file:///dir"


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketUrl:
    """Say where a bucket is. `prefix` has no slash at its ends; of a `file` bucket only `path` is set, absolute."""

    text: str
    scheme: Scheme
    bucket: str = ""
    prefix: str = ""
    path: str = ""
    endpoint: str | None = None
    region: str | None = None
    account: str | None = None

    def __str__(self) -> str:
        """Return the URL as it was written."""
        return self.text


def parse_bucket_url(text: str) -> BucketUrl:
    """Read a bucket URL; BucketInvalid with the remedy where it cannot be meant. All after `?` is a query.

    The values of the query may be raw (`endpoint=http://host:port`) or percent-encoded; the path is taken as it is.
    """
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in _QUERY_KEYS:
        raise BucketInvalid(f"{text!r} is no bucket URL: write it as one of {_EXAMPLES}")
    place, _, query = rest.partition("?")
    options = _options(query, text=text, allowed=_QUERY_KEYS[scheme])
    if scheme == "file":
        if not place.startswith("/"):
            raise BucketInvalid(f"{text!r} names no absolute path: write file:///dir, with three slashes")
        path = "/" + _joined(place, text=text)
        return BucketUrl(text=text, scheme="file", path=path)
    bucket, _, prefix = place.partition("/")
    if not bucket or "@" in bucket or ":" in bucket:
        raise BucketInvalid(
            f"{text!r} names no bucket: write it like {scheme}://bucket/prefix, keys go in the environment"
        )
    endpoint = options.get("endpoint")
    return BucketUrl(
        text=text,
        scheme=cast(Scheme, scheme),
        bucket=bucket,
        prefix=_joined(prefix, text=text),
        endpoint=None if endpoint is None else check_endpoint(endpoint, text=text),
        region=options.get("region"),
        account=options.get("account"),
    )


def check_endpoint(endpoint: str, *, text: str) -> str:
    """Return an endpoint without its final slash; BucketInvalid unless it is http(s)://host[:port]. `text` is for messages."""
    parts = urlsplit(endpoint)
    try:
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        sound = False
    if not sound or "@" in parts.netloc or parts.query:
        raise BucketInvalid(f"{text!r} has the endpoint {endpoint!r}: write it as http://host:port or https://host")
    return endpoint.rstrip("/")


def _options(query: str, *, text: str, allowed: tuple[str, ...]) -> dict[str, str]:
    """Read `name=value&…`; a plus sign stays one."""
    options: dict[str, str] = {}
    for pair in filter(None, query.split("&")):
        name, separator, value = pair.partition("=")
        if name not in allowed or not separator or not value:
            known = f"known are {', '.join(allowed)}" if allowed else "this kind of bucket takes none"
            raise BucketInvalid(f"{text!r} has the option {pair!r}: {known}, each as name=value")
        if name in options:
            raise BucketInvalid(f"{text!r} has the option {name} twice: leave one")
        options[name] = unquote(value)
    return options


def _joined(path: str, *, text: str) -> str:
    """Return the segments of a path or prefix, without slashes at its ends; BucketInvalid for `.` and `..`."""
    segments = [segment for segment in path.split("/") if segment]
    if any(segment in (".", "..") for segment in segments) or "\0" in path:
        raise BucketInvalid(f"{text!r} has a segment . or .. in its path: write the path without them")
    return "/".join(segments)
