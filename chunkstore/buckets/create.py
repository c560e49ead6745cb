"""Making a bucket, for `format --create-bucket`, and what a bucket of ours should be set to.

obstore cannot create buckets but signs URLs, and creating one on S3 is a PUT without further headers: a presigned URL to the
bucket itself does it, with no second S3 library.

Settings: nobody but who has keys may read it (S3's block of public access), and parts of uploads that were broken off go after
a week (a lifecycle rule): providers bill for them, and no listing shows them. Each is made only where the bucket has none of
its kind, so that a bucket which was there keeps what its owner chose. A provider that does not have it, or keys that may not
set it, are told, and are no error.
"""

from __future__ import annotations

import asyncio
import hashlib
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
from chunkstore.signing import S3Signer, SignedPut

_TIMEOUT_S: Final = 30.0
_CODE: Final = re.compile(r"<Code>([^<]{1,80})</Code>")
_LOCATION: Final = (
    '<CreateBucketConfiguration xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    "<LocationConstraint>{}</LocationConstraint></CreateBucketConfiguration>"
)


_SET: Final = ""
_UNSET: Final = frozenset({"NoSuchLifecycleConfiguration", "NoSuchPublicAccessBlockConfiguration"})
_XMLNS: Final = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
_PUBLIC_ACCESS: Final = (
    f"<PublicAccessBlockConfiguration {_XMLNS}><BlockPublicAcls>true</BlockPublicAcls>"
    "<IgnorePublicAcls>true</IgnorePublicAcls><BlockPublicPolicy>true</BlockPublicPolicy>"
    "<RestrictPublicBuckets>true</RestrictPublicBuckets></PublicAccessBlockConfiguration>"
)
_LIFECYCLE: Final = (
    f"<LifecycleConfiguration {_XMLNS}><Rule><ID>broken-uploads</ID><Filter><Prefix></Prefix></Filter>"
    "<Status>Enabled</Status><AbortIncompleteMultipartUpload><DaysAfterInitiation>7</DaysAfterInitiation>"
    "</AbortIncompleteMultipartUpload></Rule></LifecycleConfiguration>"
)
_SETTINGS: Final = {
    "publicAccessBlock": ("closed to the public", _PUBLIC_ACCESS),
    "lifecycle": ("rid of broken uploads after a week", _LIFECYCLE),
}
"""By the name that S3 gives it: what the bucket is then, and what is put."""


async def create_bucket(url: str, *, env: Mapping[str, str]) -> list[str]:
    """Make the bucket or directory that a URL names; one that exists already and is ours is fine. One request, not repeated.

    Return what people should know of its settings, a line each.
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
        if "AWS_ACCESS_KEY_ID" in env and "AWS_SECRET_ACCESS_KEY" in env:
            signer = S3Signer(url, env)
            return [await asyncio.to_thread(_set, signer, name) for name in _SETTINGS]
    else:
        raise BucketInvalid(
            f"bucket {url}: create it with the provider's own tools, then format without --create-bucket"
        )
    return []


def _set(signer: S3Signer, name: str) -> str:
    """Make one setting where the bucket has none of its kind; what became of it."""
    what, text = _SETTINGS[name]
    body = text.encode()
    code = _answered(signer.setting(name, sha256=None, life_s=60), "GET", None)
    if code == _SET:
        return f"{name} of the bucket stays as it was set"
    if code in _UNSET:
        code = _answered(signer.setting(name, sha256=hashlib.sha256(body).digest(), life_s=60), "PUT", body)
    return f"the bucket is {what}" if code == _SET else f"the bucket is not {what}: the provider says {code}"


def _answered(signed: SignedPut, method: str, body: bytes | None) -> str:
    """Return "" for success, else the code of the error."""
    request = urllib.request.Request(signed.url, data=body, method=method, headers=signed.headers)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S):
            return _SET
    except urllib.error.HTTPError as error:
        with error:
            found = _CODE.search(error.read(4096).decode(errors="replace"))
        return found[1] if found else f"HTTP {error.code}"
    except OSError as error:
        return str(getattr(error, "reason", error))


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
