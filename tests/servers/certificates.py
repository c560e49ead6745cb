"""An authority of tests and the certificates that it makes."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

__all__ = ["Authority", "Pair"]


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, in files."""

    cert: Path
    key: Path

    @property
    def options(self) -> tuple[str, ...]:
        """Return the options of `atoll serve`."""
        return ("--tls-cert", str(self.cert), "--tls-key", str(self.key))


class Authority:
    """Who certifies. Its own certificate is in `ca`."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        self._directory = directory
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._issued = 0
        self.ca = directory / f"{name}.pem"
        made = self._builder(self._name, self._key).add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        self.ca.write_bytes(made.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, days: int = 2
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=10))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), False)
        )

    def issue(self, *hosts: str, days: int = 2, to: Pair | None = None) -> Pair:
        """Certify hosts, names or addresses. ``to``: replace the files of an earlier one."""
        key = ec.generate_private_key(ec.SECP256R1())
        self._issued += 1
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"service {self._issued}")])
        names: list[x509.GeneralName] = [
            x509.IPAddress(ipaddress.ip_address(host)) if host[0].isdigit() else x509.DNSName(host) for host in hosts
        ]
        made = self._builder(subject, key, days=days).add_extension(x509.SubjectAlternativeName(names), False)
        pair = to or Pair(self._directory / f"cert-{self._issued}.pem", self._directory / f"key-{self._issued}.pem")
        cert = made.sign(self._key, hashes.SHA256())
        for path, data in (
            (pair.cert, cert.public_bytes(serialization.Encoding.PEM)),
            (
                pair.key,
                key.private_bytes(
                    serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
                ),
            ),
        ):
            draft = path.with_suffix(".new")
            draft.write_bytes(data)
            draft.rename(path)
        return pair
