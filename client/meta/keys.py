"""The keys of buckets, over the wire: whether a service keeps some, and giving it those of a volume."""

from __future__ import annotations

from collections.abc import Mapping

from client.meta.endpoint import Endpoint, ServiceRefused, Untrusted
from metasvc.api import atoll_pb2 as pb
from metasvc.api import wire

__all__ = ["can_keep_keys", "give_keys"]


async def can_keep_keys(endpoint: Endpoint, volume: str) -> bool:
    """Return whether the service has a master key. AccessRefused without the rights of an administrator."""
    try:
        return (await _ask(endpoint, volume, pb.KeysRequest(look=pb.Nothing()))).has_master
    except ServiceRefused as error:
        if isinstance(error, Untrusted) or "older than this client" not in error.message:
            raise
        return False


async def give_keys(endpoint: Endpoint, volume: str, variables: Mapping[str, str]) -> None:
    """Have the service keep the keys of a volume. Untrusted, before anything is sent, where others could listen."""
    if not endpoint.is_private:
        raise Untrusted(f"keys are not sent to {endpoint} in plain text: write atolls://")
    await _ask(endpoint, volume, pb.KeysRequest(put=pb.BucketKeys(variables=variables)))


async def _ask(endpoint: Endpoint, volume: str, request: pb.KeysRequest) -> pb.KeysReply:
    data = await endpoint.ask(pb.Opening.KEYS, request.SerializeToString(), volume=volume)
    reply = pb.KeysReply.FromString(data)
    if reply.HasField("failure"):
        raise wire.error_of(reply.failure)
    return reply
