"""The S3 server of the tests checks what a provider checks, counts what it is asked and survives being killed."""

from __future__ import annotations

import dataclasses
import datetime
import urllib.error
import urllib.request

import obstore
import pytest

from tests.servers.buckets import Bucket
from tests.servers.seaweedfs import SeaweedFS


def test_a_fresh_bucket_is_empty_and_keeps_objects_under_its_prefix(bucket: Bucket, s3_server: SeaweedFS) -> None:
    assert bucket.keys() == []
    obstore.put(bucket.store(), "a/b", b"bytes")
    assert bucket.keys() == ["a/b"]
    assert s3_server.bucket(bucket.name).keys() == [f"{bucket.prefix}/a/b"]


def test_the_url_has_the_form_that_format_takes(bucket: Bucket) -> None:
    assert bucket.url == f"s3://{bucket.name}/volumes/one?endpoint={bucket.endpoint}&region=us-east-1"


def test_wrong_keys_are_refused(bucket: Bucket) -> None:
    stranger = dataclasses.replace(bucket, secret_access_key="wrong")
    with pytest.raises(obstore.exceptions.PermissionDeniedError, match="SignatureDoesNotMatch"):
        obstore.put(stranger.store(), "a", b"bytes")


def test_requests_without_a_signature_are_refused(bucket: Bucket) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{bucket.endpoint}/{bucket.name}/a", timeout=10)
    with refused.value as answer:
        assert answer.code == 403


def test_a_bucket_that_does_not_exist_is_not_made_by_writing_to_it(s3_server: SeaweedFS) -> None:
    with pytest.raises(FileNotFoundError, match="NoSuchBucket"):
        obstore.put(s3_server.bucket("atoll-missing").store(), "a", b"bytes")


def test_creating_a_bucket_twice_is_harmless(bucket: Bucket, s3_server: SeaweedFS) -> None:
    obstore.put(bucket.store(), "a", b"bytes")
    s3_server.create_bucket(bucket.name)
    assert bucket.keys() == ["a"]


def test_requests_are_counted_by_bucket_and_type(bucket: Bucket, s3_server: SeaweedFS) -> None:
    store = bucket.store()
    for index in range(5):
        obstore.put(store, f"key-{index}", bytes(1000), use_multipart=False)
    for index in range(3):
        obstore.get(store, f"key-{index}").bytes()
    obstore.delete(store, "key-0")
    counts = s3_server.requests(bucket.name)
    assert counts.by_type["PUT"] - 1 == 5, "one PUT made the bucket"
    assert counts.by_type["GET"] == 3
    assert counts.received_bytes == 5000
    assert counts.sent_bytes == 3000


def test_the_server_honours_conditions_ranges_and_presigned_urls(bucket: Bucket) -> None:
    store = bucket.store()
    made = obstore.put(store, "key", b"0123456789", mode="create", use_multipart=False)
    with pytest.raises(obstore.exceptions.AlreadyExistsError):
        obstore.put(store, "key", b"other", mode="create", use_multipart=False)
    assert bytes(obstore.get_range(store, "key", start=2, end=5)) == b"234"
    assert obstore.get(store, "key", options={"if_match": made["e_tag"]}).bytes() == b"0123456789"
    with pytest.raises(obstore.exceptions.PreconditionError):
        obstore.get(store, "key", options={"if_match": '"another"'})
    with urllib.request.urlopen(obstore.sign(store, "GET", "key", datetime.timedelta(minutes=1)), timeout=10) as answer:
        assert answer.read() == b"0123456789"


def test_what_was_stored_outlives_a_kill(own_s3_server: SeaweedFS) -> None:
    own_s3_server.create_bucket("atoll-kill")
    bucket = own_s3_server.bucket("atoll-kill")
    for index in range(20):
        obstore.put(bucket.store(), f"key-{index}", index.to_bytes(1))
    own_s3_server.kill()
    with pytest.raises(obstore.exceptions.GenericError):
        bucket.keys()
    own_s3_server.start()
    assert [obstore.get(bucket.store(), f"key-{index}").bytes() for index in range(20)] == [
        bytes([i]) for i in range(20)
    ]


def test_a_paused_server_answers_nothing_and_goes_on_when_resumed(own_s3_server: SeaweedFS) -> None:
    own_s3_server.create_bucket("atoll-pause")
    store = own_s3_server.bucket("atoll-pause").store()
    impatient = own_s3_server.bucket("atoll-pause").store(timeout_s=0.2)
    obstore.put(store, "key", b"bytes")
    own_s3_server.pause()
    try:
        with pytest.raises(obstore.exceptions.GenericError):
            obstore.get(impatient, "key")
    finally:
        own_s3_server.resume()
    assert obstore.get(store, "key").bytes() == b"bytes"
