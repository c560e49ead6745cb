"""Making a bucket, for `format --create-bucket`.

obstore cannot create buckets but signs URLs, and creating one on S3 is a PUT without further headers: a presigned URL to the
bucket itself does it, with no second S3 library.
"""

from __future__ import annotations

import asyncio
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import replace
from http import HTTPStatus
from typing import Final

from chunkstore.buckets import Limits
from chunkstore.buckets.url import parse_bucket_url
from chunkstore.errors import BucketDenied, BucketInvalid, BucketUnavailable

_TIMEOUT_S: Final = 30.0
_CODE: Final = re.compile(r"<Code>([^<]{1,80})</Code>")
_LOCATION: Final = (
    '<CreateBucketConfiguration xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    "<LocationConstraint>{}</LocationConstraint></CreateBucketConfiguration>"
)


async def create_bucket(url: str, *, env: Mapping[str, str]) -> None:
    """Make the bucket or directory that a URL names; one that exists already and is ours is fine. One request, not repeated.

    BucketInvalid on GCS and Azure, where buckets need more settings than a URL has.
    """
    place = parse_bucket_url(url)
    if place.scheme == "file":
        from chunkstore.buckets.directory import make_directory

        try:
            await asyncio.to_thread(make_directory, place.path)
        except OSError as error:
            raise BucketDenied(
                f"cannot create the directory {place.path}: {error.strerror}", errno=error.errno
            ) from error
    elif place.scheme == "s3":
        from chunkstore.buckets.cloud import CloudStore

        # Without the prefix, because the URL shall be that of the bucket and not of an object in it.
        store = CloudStore(replace(place, prefix=""), env=env, attempt_timeout_s=Limits().attempt_timeout_s)
        body = _LOCATION.format(place.region).encode() if store.needs_location else b""
        await asyncio.to_thread(_put, store.presigned_put_of_bucket(), body, str(store))
    else:
        raise BucketInvalid(
            f"bucket {url}: create it with the provider's own tools, then format without --create-bucket"
        )


def _put(url: str, body: bytes, where: str) -> None:
    request = urllib.request.Request(url, data=body, method="PUT", headers={"Content-Type": "application/xml"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S):
            return
    except urllib.error.HTTPError as error:
        with error:
            found = _CODE.search(error.read(4096).decode(errors="replace"))
        code = found[1] if found else "no details"
        if code == "BucketAlreadyOwnedByYou":
            return
        reason = f"{where}: cannot be created: HTTP {error.code} ({code})"
        if error.code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise BucketDenied(f"{reason}: check the keys, and what they may do") from error
        if error.code >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise BucketUnavailable(reason) from error
        raise BucketInvalid(f"{reason}: choose another name or region") from error
    except OSError as error:
        cause = getattr(error, "reason", error)
        raise BucketUnavailable(f"{where}: {cause}: check that the endpoint can be reached") from error
