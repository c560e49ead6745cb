"""Where a service is, how it is reached, and what its refusals mean.

Owns the one table from the reasons for which a service ends a connection to errors of ours, and which process of a service is
asked next.

A service may have several processes. Each volume is owned by one of them at a time, and any of them says which one. A client
knows some from its address. It goes where it was sent last, else to the one that it asked last, and to the next one
when a process cannot be reached or wants nobody now: it may be ending, or be gone while the store still calls it the
owner. Who is sent to and fro waits between (`sent_on`).

The token is sent only over TLS, to a host whose certificate names it, or to this machine, unless plain text was allowed. Where
a service sends a client does not change that: who came by TLS goes on by TLS.
"""

from __future__ import annotations

import asyncio
import errno
import ssl
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Final

from chunkstore.errors import AtollError
from metasvc.api import atoll_pb2 as pb
from metasvc.api.frames import MAX_REPLY_BYTES, ConnectionLost, EndedByService, Frames, NotOurs, Stalled
from metasvc.api.server import Server, is_loopback, owner_of
from metasvc.errors import FsError, VolumeExists, VolumeMissing

if TYPE_CHECKING:
    from client.meta.encryption import Trust

CONNECT_S: Final = 10.0
"""How long a connection may take to come about."""
CONNECT_ONE_S: Final = 3.0
"""Where there is another process to ask."""
SENT_ON_MOST: Final = 2
"""So often in a row a client goes at once where it is sent: an owner that is dead is named until its ownership has run out."""


class ServiceUnavailable(AtollError):
    """Say that the service cannot be reached now."""

    code = "service-unavailable"
    errno = errno.EIO
    retryable = True


class AccessRefused(AtollError):
    """Say that the service does not accept the token."""

    code = "access-refused"
    errno = errno.EACCES


class ServiceRefused(AtollError):
    """Say why the service does not want to speak with this client."""

    code = "service-refused"
    errno = errno.EPROTO


class Untrusted(ServiceRefused):
    """Say why nothing was sent to the service: it may be somebody else, or others could listen."""

    code = "untrusted"
    errno = errno.EACCES


class SessionEnded(AtollError):
    """Say that the session has ended, so that what it had not committed cannot be committed any more."""

    code = "session-ended"
    errno = errno.ESTALE


class Endpoint:
    """The processes of a service, and who asks them. For one volume, or for none."""

    def __init__(
        self,
        servers: Sequence[Server],
        token: str,
        *,
        reread: Callable[[], str] | None = None,
        trust: Trust | None = None,
        is_plain_allowed: bool = False,
    ) -> None:
        """Take at least one process. ``reread`` returns the token as its file has it now: platforms replace tokens in time.

        ``trust``: connect by TLS, and to whom these authorities have certified; else in plain text, to this machine or, if
        ``is_plain_allowed``, anywhere.
        """
        self.token = token
        self._trust = trust
        self._is_plain_allowed = is_plain_allowed
        self._reread = reread
        self._servers = tuple(servers)
        self._owner: Server | None = None
        """Where this client was sent."""
        self._asked = self._servers[0]
        self._is_in = False
        """It answered, and nothing went wrong since."""
        self._sent_on = 0
        """How often this client was sent on since it was let in."""

    def __str__(self) -> str:
        """Return the process that was asked last, as it stands in messages."""
        return str(self._asked)

    @property
    def is_private(self) -> bool:
        """Return whether nobody else can read what is sent, whichever process is asked."""
        named = self._servers if self._owner is None else (*self._servers, self._owner)
        return self._trust is not None or all(is_loopback(server.host) for server in named)

    def take_new_token(self) -> bool:
        """Read the token again; whether it is another one."""
        if self._reread is None:
            return False
        try:
            before, self.token = self.token, self._reread()
        except AtollError:
            # It is being replaced: the one that is known may still do.
            return False
        return self.token != before

    async def connect(self, method: pb.Opening.Method.ValueType, volume: str = "") -> Frames:
        """Connect to the first process that can be reached, and say what for; it has not answered yet. ServiceUnavailable.

        The caller closes it, and says with `failed` or `sent_on` when that was the wrong one.
        """
        self.take_new_token()
        unreachable: list[AtollError] = []
        in_turn = self._in_turn()
        for server in in_turn:
            self._asked = server
            try:
                frames = await self._connect(server, CONNECT_S if len(in_turn) == 1 else CONNECT_ONE_S)
            except ServiceUnavailable as error:
                unreachable.append(error)
                if server == self._owner:
                    self._owner = None
                continue
            frames.greet()
            frames.send(pb.Opening(method=method, token=self.token, volume=volume).SerializeToString())
            return frames
        raise unreachable[0] if len(unreachable) == 1 else ServiceUnavailable("; ".join(map(str, unreachable)))

    def _in_turn(self) -> list[Server]:
        first = self._servers.index(self._asked) if self._asked in self._servers else 0
        known = self._servers[first:] + self._servers[:first]
        return list(dict.fromkeys(known if self._owner is None else (self._owner, *known)))

    async def _connect(self, server: Server, timeout_s: float) -> Frames:
        loop = asyncio.get_running_loop()
        host = server.host.strip("[]")
        if self._trust is None and not self._is_plain_allowed and not is_loopback(host):
            raise Untrusted(
                f"atoll:// would send the token to {server} in plain text: write atolls://, or give --insecure "
                "(ATOLL_INSECURE=1) if the network is trusted"
            )
        context = None if self._trust is None else self._trust.context()
        try:
            async with asyncio.timeout(timeout_s):
                _, frames = await loop.create_connection(
                    lambda: Frames(max_bytes=MAX_REPLY_BYTES, is_client=True), host, server.port, ssl=context
                )
        except ssl.SSLCertVerificationError as error:
            raise Untrusted(
                f"the certificate of the service at {server} is not accepted ({error.verify_message}): check the address, "
                "or name its authority with --tls-ca or ATOLL_TLS_CA"
            ) from error
        except ssl.SSLError as error:
            raise Untrusted(
                f"no TLS with the service at {server} ({error.reason or 'it broke off'}): write atoll:// if it has none"
            ) from error
        except TimeoutError as error:
            raise ServiceUnavailable(f"the service at {server} does not answer") from error
        except (OSError, UnicodeError, OverflowError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            raise ServiceUnavailable(f"the service at {server} is not reachable: {reason}") from error
        return frames

    def sent_on(self, error: Exception) -> bool:
        """Take note of how a connection ended, and where that sends this client; whether to go there at once."""
        if isinstance(error, ConnectionLost) and self._is_in:
            # The network's doing, or the end of the process: then it cannot be reached, and another one is asked.
            self._is_in = False
            return False
        owner = owner_of(error.owner) if isinstance(error, EndedByService) else None
        if owner is None or owner == self._asked:
            self.failed()
            return False
        self._is_in = False
        self._owner = owner
        self._sent_on += 1
        return self._sent_on <= SENT_ON_MOST

    def failed(self) -> None:
        """Ask another process the next time, if there is one: this one does not serve, and does not say who does."""
        self._is_in = False
        self._owner = None
        position = self._servers.index(self._asked) + 1 if self._asked in self._servers else 0
        self._asked = self._servers[position % len(self._servers)]

    def let_in(self) -> None:
        """Take note that the process that was asked is the right one."""
        self._is_in = True
        self._owner = self._asked
        self._sent_on = 0

    async def ask(self, method: pb.Opening.Method.ValueType, request: bytes, *, volume: str = "") -> bytes:
        """Ask once and return the answer. One connection. Raises what `error` makes of a failure."""
        async with aclosing(self.answers(method, request, volume=volume)) as answers:
            async for answer in answers:
                return answer
        raise ServiceUnavailable(f"the service at {self} answered nothing")

    async def answers(
        self, method: pb.Opening.Method.ValueType, request: bytes, *, volume: str = ""
    ) -> AsyncGenerator[bytes, None]:
        """Ask, and yield every answer. One connection to the right process. Raises what `error` makes of a failure."""
        is_sent_on = True
        while is_sent_on:
            is_sent_on = False
            frames = await self.connect(method, volume)
            try:
                frames.send(request)
                while True:
                    answer = await frames.read()
                    self.let_in()
                    yield answer
            except EndedByService as ended:
                if ended.reason != pb.Ended.DONE:
                    is_sent_on = self.sent_on(ended)
                    if not is_sent_on:
                        raise self.error(ended) from ended
            except (ConnectionLost, Stalled, NotOurs) as error:
                self.failed()
                raise self.error(error) from error
            finally:
                frames.close()

    def error(self, error: Exception) -> AtollError:
        """Return what the end of a connection means."""
        if isinstance(error, NotOurs):
            return ServiceRefused(
                f"what answers at {self} is no metadata service of AtollFS: check the address ({error.message})"
            )
        if not isinstance(error, EndedByService):
            return ServiceUnavailable(f"the service at {self}: {error}")
        details = error.details
        match error.reason:
            case pb.Ended.SESSION_ENDED:
                return SessionEnded("the session has ended: the service did not hear of this client for too long")
            case pb.Ended.NO_ACCESS:
                return AccessRefused(f"the service at {self} refuses: {details}")
            case pb.Ended.NO_VOLUME:
                return VolumeMissing(details)
            case pb.Ended.VOLUME_EXISTS:
                return VolumeExists(details)
            case pb.Ended.INVALID:
                return ServiceRefused(f"the service at {self} refuses: {details}", errno=FsError(errno.EINVAL).errno)
            case pb.Ended.UNKNOWN_METHOD:
                return ServiceRefused(f"the service at {self} is older than this client: upgrade it")
        return ServiceUnavailable(f"the service at {self} is not available: {details}")
