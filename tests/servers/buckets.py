"""A bucket of a test: where it is, with which keys, and how to look into it past the code under test."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import dataclass, replace

import obstore
from obstore.store import S3Store

REGION = "us-east-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Name one prefix of one bucket, reached at `endpoint`, which may be a proxy."""

    name: str
    prefix: str
    endpoint: str
    access_key_id: str
    secret_access_key: str

    @property
    def url(self) -> str:
        """Spell it as `atoll format --bucket` takes it."""
        return f"s3://{self.name}/{self.prefix}?endpoint={self.endpoint}&region={REGION}"

    @property
    def environment(self) -> dict[str, str]:
        """Name the keys as every S3 client reads them from its environment."""
        return {"AWS_ACCESS_KEY_ID": self.access_key_id, "AWS_SECRET_ACCESS_KEY": self.secret_access_key}

    def at(self, endpoint: str) -> Bucket:
        """Return the same bucket reached at another address."""
        return replace(self, endpoint=endpoint)

    def store(self, *, timeout_s: float = 20.0) -> S3Store:
        """Open it with obstore: keys are relative to the prefix, errors come at once, without a retry."""
        return S3Store(
            self.name,
            prefix=self.prefix,
            endpoint=self.endpoint,
            region=REGION,
            access_key_id=self.access_key_id,
            secret_access_key=self.secret_access_key,
            client_options={"allow_http": True, "timeout": datetime.timedelta(seconds=timeout_s)},
            retry_config={"max_retries": 0},
        )

    def keys(self) -> list[str]:
        """List all keys under the prefix, relative to it and sorted."""
        return sorted(self._paths())

    def _paths(self) -> Iterator[str]:
        for page in obstore.list(self.store()):
            for meta in page:
                yield meta["path"]
