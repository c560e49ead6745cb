"""The replies that a session may ask for again.

Owns them, encoded as they go over the wire: FromService messages with one reply each, which is also what several of them
joined are. Must not know what they say.

Invariants: a reply is kept from the stretch in which its changes come into force until the client has confirmed it; `row` is
written in the same batch as those changes. So whatever is durable of a request, its reply is, too; after a restart a repeated
request finds it here. Requests that changed nothing are not kept: to run them again is as good.
"""

from __future__ import annotations

from collections.abc import Collection

from metasvc.api import atoll_pb2 as pb
from metasvc.model import Ino, Replies, SessionId


class ReplyLog:
    """The replies of one session."""

    def __init__(self, session_id: SessionId, stored: Replies | None = None) -> None:
        """Begin with what is stored of an earlier life of the session."""
        self._session_id = session_id
        self.confirmed = 1
        self._kept: dict[int, bytes] = {}
        if stored is not None:
            self.confirmed = stored.confirmed
            for reply in pb.FromService.FromString(stored.packed).replies:
                self._kept[reply.number] = framed(reply)

    def __len__(self) -> int:
        """Return how many are kept."""
        return len(self._kept)

    def get(self, number: int) -> bytes | None:
        """Return the reply to a request that changed something, framed, if it is known."""
        return self._kept.get(number)

    def opened(self, repeated: Collection[int]) -> list[Ino]:
        """Return the inodes that those of the requests opened that the client is about to repeat."""
        kept = [self._kept[number] for number in repeated if number in self._kept]
        replies = [pb.FromService.FromString(each).replies[0] for each in kept]
        return [Ino(reply.inodes.ino[0]) for reply in replies if reply.opens]

    def keep(self, number: int, reply: bytes) -> Replies:
        """Keep a framed reply; the row that is to be written with the changes that it tells of."""
        self._kept[number] = reply
        return Replies(self._session_id, self.confirmed, b"".join(self._kept.values()))

    def confirm(self, number: int) -> None:
        """Take note that no request below a number will be repeated. Numbers never go back."""
        if number <= self.confirmed:
            return
        self.confirmed = number
        for known in [known for known in self._kept if known < number]:
            del self._kept[known]


def framed(reply: pb.Reply) -> bytes:
    """Encode a reply as a FromService message that holds it: messages joined are one message with all of their replies."""
    return pb.FromService(replies=[reply]).SerializeToString()
