"""The certificate of the service: what it shows to whoever connects by TLS, and how another one takes its place.

Owns reading the files and noticing that they were replaced. A new pair counts only as a whole: it is read into a context of its
own, and connections that come later get that context (by the callback of their TLS hello, which has no await). If the files do
not fit together, because one of them is replaced already and the other is not, the pair of before stays and the next look
tries again. Connections that stand are not touched.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import ssl
from typing import Final

from chunkstore.errors import AtollError

__all__ = ["LOOK_S", "Certificate", "CertificateInvalid"]

LOOK_S: Final = 5.0
"""So often it is looked whether the files were replaced."""

log = logging.getLogger(__name__)


class CertificateInvalid(AtollError):
    """Say why a certificate or its key cannot be used."""

    code = "bad-certificate"
    errno = errno.EINVAL


class Certificate:
    """A certificate with its chain, and its key, in two files of PEM."""

    def __init__(self, cert_path: str, key_path: str) -> None:
        """Read them. CertificateInvalid."""
        self._paths = cert_path, key_path
        # Before they are read: what is replaced meanwhile is read again.
        self._read_as = self._version()
        self.context = self._current = self._read()
        """What a server is made with; it shows the certificate that counts when somebody connects."""
        self.context.sni_callback = self._choose
        self.readings = 1

    def look(self, *, is_asked: bool = False) -> None:
        """Read the files again if they were replaced, or because somebody asks. What cannot be used is logged."""
        try:
            version = self._version()
            if version == self._read_as and not is_asked:
                return
            self._current = self._read()
        except CertificateInvalid as error:
            log.warning("%s; the certificate of before stays", error)
            return
        self._read_as = version
        self.readings += 1
        log.warning("the certificate was read again from %s", self._paths[0])

    async def watch(self) -> None:
        """Look now and then, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            self.look()

    def _choose(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = self._current

    def _version(self) -> tuple[tuple[int, int, int], ...]:
        try:
            found = [os.stat(path) for path in self._paths]
        except OSError as error:
            raise CertificateInvalid(
                f"{error.filename}: {error.strerror}; name it with --tls-cert, --tls-key"
            ) from error
        return tuple((each.st_ino, each.st_mtime_ns, each.st_size) for each in found)

    def _read(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        cert_path, key_path = self._paths
        try:
            # A passphrase would be asked for at the terminal.
            context.load_cert_chain(cert_path, key_path, password="")
        except (OSError, ValueError) as error:
            reason = error.reason if isinstance(error, ssl.SSLError) else getattr(error, "strerror", None)
            raise CertificateInvalid(
                f"{cert_path} and {key_path} are no certificate and its key, in PEM without a passphrase "
                f"({reason or error}): name them with --tls-cert, --tls-key"
            ) from error
        return context
