"""Names of tenants and volumes, as calls give them."""

from __future__ import annotations

from metasvc.errors import FsError, VolumeMissing

__all__ = ["check_name", "volume_name"]


def volume_name(text: str) -> tuple[str, str]:
    """Return tenant and name of TENANT/NAME. VolumeMissing, FsError EINVAL."""
    try:
        tenant, name = text.split("/")
    except ValueError as error:
        raise VolumeMissing("the call names no volume: upgrade the client") from error
    check_name(tenant)
    check_name(name)
    return tenant, name


def check_name(text: str) -> None:
    """Refuse what cannot be the name of a tenant or a volume: they stand in addresses. FsError EINVAL."""
    allowed = text.replace("-", "").replace("_", "").replace(".", "")
    if not 0 < len(text) <= 63 or not allowed.isalnum() or not text.isascii() or not text[0].isalnum():
        raise FsError(
            22, f"{text[:80]!r} is no name: letters, digits, '-', '_' and '.', at most 63, a letter or digit first"
        )
