"""URLs that are signed here, against those of obstore and against a server that checks signatures."""

from __future__ import annotations

import calendar
import hashlib
import time
import urllib.error
import urllib.request
from datetime import timedelta
from urllib.parse import parse_qs, urlsplit

import obstore
import pytest
from obstore.store import S3Store

from chunkstore.errors import BucketDenied, BucketInvalid
from chunkstore.signing import S3Signer
from tests.servers.buckets import Bucket
from tests.servers.seaweedfs import ACCESS_KEY_ID, SECRET_ACCESS_KEY

KEYS = {"AWS_ACCESS_KEY_ID": "AKID", "AWS_SECRET_ACCESS_KEY": "the/secret+of tests"}


def signature(url: str) -> str:
    [found] = parse_qs(urlsplit(url).query)["X-Amz-Signature"]
    return found


@pytest.mark.parametrize("key", ["volume/0/1.0", "a b/ü+&=?/%41~-_.", "x"])
@pytest.mark.parametrize("prefix", ["", "deep/pre fix"])
@pytest.mark.parametrize("token", ["", "to/ken+="])
@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:8333", "https://s3.example.org", ""])
def test_a_signature_is_that_of_another_implementation(key: str, prefix: str, token: str, endpoint: str) -> None:
    config = {"region": "eu-north-1", "virtual_hosted_style_request": not endpoint}
    if endpoint:
        config["endpoint"] = endpoint
    if token:
        config["session_token"] = token
    other = S3Store(
        "a-bucket",
        prefix=prefix or None,
        access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        client_options={"allow_http": True},
        **config,  # type: ignore[arg-type]
    )
    theirs = obstore.sign(other, "GET", key, timedelta(seconds=777))
    query = parse_qs(urlsplit(theirs).query)
    at_s = calendar.timegm(time.strptime(query["X-Amz-Date"][0], "%Y%m%dT%H%M%SZ"))
    url = f"s3://a-bucket/{prefix}?region=eu-north-1" + (f"&endpoint={endpoint}" if endpoint else "")
    keys = {**KEYS, **({"AWS_SESSION_TOKEN": token} if token else {})}
    ours = S3Signer(url, keys, clock=lambda: at_s).get(key, life_s=777)
    assert parse_qs(urlsplit(ours).query) == query
    assert urlsplit(ours)[:2] == urlsplit(theirs)[:2]
    assert signature(ours) == signature(theirs)


def test_the_key_of_the_day_is_derived_anew_every_day() -> None:
    now_s = 1_700_000_000.0
    signer = S3Signer("s3://b", KEYS, clock=lambda: now_s)
    before = signer.get("k", life_s=60)
    assert signer.get("k", life_s=60) == before
    now_s += 86400
    after = signer.get("k", life_s=60)
    assert after == S3Signer("s3://b", KEYS, clock=lambda: now_s).get("k", life_s=60)
    assert signature(after) != signature(before)


def test_only_buckets_on_s3_with_all_keys_are_signed_for() -> None:
    with pytest.raises(BucketInvalid):
        S3Signer("gs://b", KEYS)
    with pytest.raises(BucketDenied, match="AWS_SECRET_ACCESS_KEY"):
        S3Signer("s3://b", {"AWS_ACCESS_KEY_ID": "x"})


def signer_of(bucket: Bucket) -> S3Signer:
    return S3Signer(bucket.url, {"AWS_ACCESS_KEY_ID": ACCESS_KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET_ACCESS_KEY})


def send(
    method: str, url: str, *, headers: dict[str, str] | None = None, data: bytes | None = None
) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, method=method, headers=headers or {}, data=data), timeout=30
        ) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_a_server_takes_what_was_signed_and_nothing_else(bucket: Bucket) -> None:
    signer = signer_of(bucket)
    data = b"the bytes that were signed" * 100
    put = signer.put("v/0/1.0", sha256=hashlib.sha256(data).digest(), life_s=60)
    assert send("PUT", put.url, data=data)[0] == 403, "without the headers"
    assert send("PUT", put.url, headers={**put.headers, "if-none-match": "no"}, data=data)[0] == 403
    assert send("PUT", put.url, headers=put.headers, data=data[:-1] + b"?")[0] == 400
    get = signer.get("v/0/1.0", life_s=60)
    assert send("GET", get)[0] == 404
    assert send("PUT", put.url, headers=put.headers, data=data)[0] == 200
    assert send("PUT", put.url, headers=put.headers, data=data)[0] == 412
    assert send("GET", get) == (200, data)
    assert send("GET", get, headers={"Range": "bytes=4-8"}) == (206, data[4:9])
    assert send("DELETE", get)[0] == 403
    assert send("PUT", get, data=b"x")[0] == 403
    assert send("GET", get.replace("1.0", "2.0"))[0] == 403
    assert send("GET", get.replace("X-Amz-Expires=60", "X-Amz-Expires=6000"))[0] == 403


def test_a_url_whose_time_is_over_is_refused_as_expired(bucket: Bucket) -> None:
    signer = S3Signer(
        bucket.url,
        {"AWS_ACCESS_KEY_ID": ACCESS_KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET_ACCESS_KEY},
        clock=lambda: time.time() - 100,
    )
    status, text = send("GET", signer.get("v/0/1.0", life_s=60))
    assert status == 403
    assert b"expired" in text.lower(), text
