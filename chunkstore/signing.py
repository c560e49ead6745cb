"""Presigned URLs for S3: who has one may read, or put, one object for a while, without a key.

Owns AWS Signature Version 4 in the query ("Authenticating Requests: Using Query Parameters", Amazon S3 API Reference), as far
as requests for one object, or for one page of a listing, need it. Pure, but for the clock. obstore signs URLs, too, but no
headers: a PUT is signed here with `If-None-Match: *`, so that it replaces nothing, and with the SHA-256 of the bytes, so that
it puts these and no others. The key that signs is derived once a day (four HMACs less for each URL).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple
from urllib.parse import quote, urlsplit

from chunkstore.buckets.url import check_endpoint, parse_bucket_url
from chunkstore.errors import BucketDenied, BucketInvalid

__all__ = ["S3Signer", "SignedPut"]

_ALGORITHM: Final = "AWS4-HMAC-SHA256"
_UNSIGNED: Final = "UNSIGNED-PAYLOAD"
_DEFAULT_REGION: Final = "us-east-1"
LISTED_AT_ONCE: Final = 1000


class SignedPut(NamedTuple):
    """Where to put one object, and the headers that must be sent as they are."""

    url: str
    headers: dict[str, str]


class S3Signer:
    """Sign for one bucket, with one set of keys."""

    def __init__(self, bucket_url: str, keys: Mapping[str, str], *, clock: Callable[[], float] = time.time) -> None:
        """``keys`` are variables as `chunkstore.buckets.cloud` reads them; ``clock`` counts seconds since 1970.

        BucketInvalid for a bucket that is not on S3, BucketDenied where the keys are not enough.
        """
        place = parse_bucket_url(bucket_url)
        if place.scheme != "s3":
            raise BucketInvalid(f"bucket {place} cannot be presigned: it is not on S3")
        try:
            self._key_id, self._secret = keys["AWS_ACCESS_KEY_ID"], keys["AWS_SECRET_ACCESS_KEY"]
        except KeyError as error:
            raise BucketDenied(f"bucket {place}: no {error.args[0]} among the keys: set them again") from None
        self._token = keys.get("AWS_SESSION_TOKEN")
        self._region = place.region or keys.get("AWS_REGION") or keys.get("AWS_DEFAULT_REGION") or _DEFAULT_REGION
        endpoint = place.endpoint
        if endpoint is None and (named := keys.get("AWS_ENDPOINT_URL_S3") or keys.get("AWS_ENDPOINT_URL")):
            endpoint = check_endpoint(named, text="AWS_ENDPOINT_URL")
        path = ""
        if endpoint is None and "." not in place.bucket:
            endpoint = f"https://{place.bucket}.s3.{self._region}.amazonaws.com"
        else:
            endpoint = endpoint or f"https://s3.{self._region}.amazonaws.com"
            path = f"/{_quoted(place.bucket)}"
        parts = urlsplit(endpoint)
        self._host = parts.netloc
        self._origin = f"{parts.scheme}://{parts.netloc}"
        self._bucket = parts.path.rstrip("/") + path
        self._base = self._bucket + (f"/{_quoted(place.prefix)}" if place.prefix else "")
        self._prefix = f"{place.prefix}/" if place.prefix else ""
        self._payer = keys.get("AWS_REQUEST_PAYER", "").lower() in ("1", "true", "yes", "on", "requester")
        self._put_headers = {
            header: keys[name]
            for header, name in (
                ("x-amz-server-side-encryption", "AWS_SERVER_SIDE_ENCRYPTION"),
                ("x-amz-server-side-encryption-aws-kms-key-id", "AWS_SSE_KMS_KEY_ID"),
            )
            if keys.get(name)
        }
        self._has_checksum = keys.get("AWS_CHECKSUM_ALGORITHM", "SHA256").lower() != "none"
        self._clock = clock
        self._day = ""
        self._signing_key = b""

    def get(self, key: str, *, life_s: int) -> str:
        """Return a URL that reads an object, whole or a range, for so long."""
        return self._signed("GET", self._path(key), {}, life_s)

    def head(self, key: str, *, life_s: int) -> str:
        """Return a URL that describes an object, for so long."""
        return self._signed("HEAD", self._path(key), {}, life_s)

    def delete(self, key: str, *, life_s: int) -> str:
        """Return a URL that deletes an object, for so long."""
        return self._signed("DELETE", self._path(key), {}, life_s)

    def listing(self, prefix: str, *, start_after: str = "", life_s: int) -> str:
        """Return a URL that lists a page, 1,000 objects at most, of those whose key starts with a prefix (ListObjectsV2).

        ``start_after``, a key, leaves out all up to and including it. Both are signed: another page takes another URL.
        """
        asked = {"list-type": "2", "max-keys": str(LISTED_AT_ONCE), "prefix": self._prefix + prefix}
        if start_after:
            asked["start-after"] = self._prefix + start_after
        return self._signed("GET", self._bucket or "/", {}, life_s, asked)

    def put(self, key: str, *, sha256: bytes, life_s: int) -> SignedPut:
        """Return what puts an object with these bytes, once and if there is none, for so long."""
        headers = {"if-none-match": "*", **self._put_headers}
        if self._has_checksum:
            headers["x-amz-checksum-sha256"] = base64.b64encode(sha256).decode()
        return SignedPut(self._signed("PUT", self._path(key), headers, life_s), headers)

    def setting(self, name: str, *, sha256: bytes | None, life_s: int) -> SignedPut:
        """Return what reads a setting of the bucket ("lifecycle" …), or with a digest what puts one with these bytes."""
        path = self._bucket or "/"
        if sha256 is None:
            return SignedPut(self._signed("GET", path, {}, life_s, {name: ""}), {})
        headers = {"x-amz-checksum-sha256": base64.b64encode(sha256).decode()}
        return SignedPut(self._signed("PUT", path, headers, life_s, {name: ""}), headers)

    def _path(self, key: str) -> str:
        return f"{self._base}/{_quoted(key)}"

    def _signed(
        self, method: str, path: str, headers: Mapping[str, str], life_s: int, asked: Mapping[str, str] | None = None
    ) -> str:
        now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self._clock()))
        day = now[:8]
        scope = f"{day}/{self._region}/s3/aws4_request"
        signed_headers = {"host": self._host, **headers}
        names = ";".join(sorted(signed_headers))
        query = {
            **(asked or {}),
            "X-Amz-Algorithm": _ALGORITHM,
            "X-Amz-Credential": f"{self._key_id}/{scope}",
            "X-Amz-Date": now,
            "X-Amz-Expires": str(life_s),
            "X-Amz-SignedHeaders": names,
        }
        if self._token:
            query["X-Amz-Security-Token"] = self._token
        if self._payer:
            query["x-amz-request-payer"] = "requester"
        text = "&".join(f"{name}={quote(value, safe='-_.~')}" for name, value in sorted(query.items()))
        lines = "".join(f"{name}:{signed_headers[name].strip()}\n" for name in sorted(signed_headers))
        request = f"{method}\n{path}\n{text}\n{lines}\n{names}\n{_UNSIGNED}"
        to_sign = f"{_ALGORITHM}\n{now}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
        signature = hmac.digest(self._key_of(day), to_sign.encode(), "sha256").hex()
        return f"{self._origin}{path}?{text}&X-Amz-Signature={signature}"

    def _key_of(self, day: str) -> bytes:
        if day != self._day:
            key = f"AWS4{self._secret}".encode()
            for part in (day, self._region, "s3", "aws4_request"):
                key = hmac.digest(key, part.encode(), "sha256")
            self._day, self._signing_key = day, key
        return self._signing_key


def _quoted(path: str) -> str:
    return quote(path, safe="/-_.~")
