"""Bucket URLs: what is understood, and what is refused with the remedy."""

from __future__ import annotations

import pytest

from chunkstore.buckets.url import BucketUrl, parse_bucket_url
from chunkstore.errors import BucketInvalid


def _fields(place: BucketUrl) -> dict[str, str | None]:
    names = ("bucket", "prefix", "path", "endpoint", "region", "account")
    return {name: value for name in names if (value := getattr(place, name))}


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("s3://bkt", {"bucket": "bkt"}),
        ("s3://bkt/", {"bucket": "bkt"}),
        ("s3://bkt/a/b", {"bucket": "bkt", "prefix": "a/b"}),
        ("s3://bkt//a//b/", {"bucket": "bkt", "prefix": "a/b"}),
        ("s3://bkt/a+b%20c", {"bucket": "bkt", "prefix": "a+b%20c"}),
        (
            "s3://bkt/p?endpoint=http://127.0.0.1:9000&region=eu-west-1",
            {"bucket": "bkt", "prefix": "p", "endpoint": "http://127.0.0.1:9000", "region": "eu-west-1"},
        ),
        ("s3://bkt?endpoint=http%3A%2F%2Fhost%3A9000", {"bucket": "bkt", "endpoint": "http://host:9000"}),
        ("s3://bkt?endpoint=https://host/", {"bucket": "bkt", "endpoint": "https://host"}),
        ("s3://bkt?endpoint=http://[::1]:9000", {"bucket": "bkt", "endpoint": "http://[::1]:9000"}),
        ("s3://bkt?region=us+east", {"bucket": "bkt", "region": "us+east"}),
        ("s3://bkt?", {"bucket": "bkt"}),
        ("gs://bkt/a", {"bucket": "bkt", "prefix": "a"}),
        ("az://box/a?account=acc", {"bucket": "box", "prefix": "a", "account": "acc"}),
        ("file:///dir", {"path": "/dir"}),
        ("file:///dir/a b/", {"path": "/dir/a b"}),
        ("file:////dir//x", {"path": "/dir/x"}),
    ],
)
def test_a_url_is_read_as_it_is_meant(text: str, fields: dict[str, str]) -> None:
    place = parse_bucket_url(text)
    assert _fields(place) == fields
    assert place.scheme == text.split(":")[0]
    assert str(place) == text


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("", "is no bucket URL: write it as one of s3://"),
        ("bkt/a", "is no bucket URL: write it as one of s3://"),
        ("/dir", "is no bucket URL: write it as one of s3://"),
        ("S3://bkt", "is no bucket URL: write it as one of s3://"),
        ("http://host/bkt", "is no bucket URL: write it as one of s3://"),
        ("s3://", "names no bucket: write it like s3://bucket/prefix"),
        ("s3:///a", "names no bucket: write it like s3://bucket/prefix"),
        ("s3://key:secret@bkt", "keys go in the environment"),
        ("s3://bkt/a/../b", "write the path without them"),
        ("s3://bkt/./b", "write the path without them"),
        ("s3://bkt?endpoint=host:9000", "write it as http://host:port"),
        ("s3://bkt?endpoint=ftp://host", "write it as http://host:port"),
        ("s3://bkt?endpoint=http://", "write it as http://host:port"),
        ("s3://bkt?endpoint=http://host:99999", "write it as http://host:port"),
        ("s3://bkt?endpoint=http://k:s@host", "write it as http://host:port"),
        ("s3://bkt?endpoint=", "known are endpoint, region, each as name=value"),
        ("s3://bkt?endpoint", "known are endpoint, region, each as name=value"),
        ("s3://bkt?zone=a", "known are endpoint, region, each as name=value"),
        ("s3://bkt?region=a&region=b", "has the option region twice: leave one"),
        ("gs://bkt?region=a", "known are endpoint, each as name=value"),
        ("file://dir", "write file:///dir, with three slashes"),
        ("file://", "write file:///dir, with three slashes"),
        ("file:///dir?endpoint=http://x", "this kind of bucket takes none"),
        ("file:///dir/../etc", "write the path without them"),
        ("file:///a\0b", "write the path without them"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused_with_the_remedy(text: str, remedy: str) -> None:
    with pytest.raises(BucketInvalid) as caught:
        parse_bucket_url(text)
    assert remedy in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
