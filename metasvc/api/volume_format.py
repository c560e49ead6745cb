"""VolumeFormat as the JSON text that stores keep, with its own version.

Owns the names of the fields and the refusal of what a newer AtollFS wrote. Must not know any database.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Final

from metasvc.errors import SchemaTooNew, StoreError
from metasvc.model import VolumeFormat

__all__ = ["FORMAT_VERSION", "check_same_volume", "dump_format", "parse_format"]

FORMAT_VERSION: Final = 1

_FIELDS: Final = {field.name: field for field in dataclasses.fields(VolumeFormat)}
# Fields without a default were there from version 1 on; later ones have one, so that older text still parses.
_REQUIRED: Final = {name for name, field in _FIELDS.items() if field.default is dataclasses.MISSING}
_TYPES: Final[dict[str, type | tuple[type, ...]]] = {"str": str, "int": int, "float": (int, float), "bool": bool}
_ONLY_IF_SET: Final = frozenset({"loading"})
"""Fields that are left out while they have their default: a version that does not know them reads all volumes but those."""


def dump_format(volume_format: VolumeFormat) -> str:
    """Return the JSON object of a format: one key for each field of VolumeFormat, sorted."""
    values = dataclasses.asdict(volume_format)
    for name in _ONLY_IF_SET:
        if not values[name]:
            del values[name]
    return json.dumps(values, sort_keys=True, ensure_ascii=False)


def parse_format(text: str) -> VolumeFormat:
    """Inverse of dump_format(). Raises SchemaTooNew for a newer version, StoreError for what is no format."""
    try:
        values: Any = json.loads(text)
    except ValueError as exc:
        raise StoreError(
            f"the stored format of a volume is not JSON: {exc}; restore the metadata from a backup"
        ) from exc
    if not isinstance(values, dict) or not isinstance(values.get("version"), int):
        raise StoreError("the stored format of a volume has no version; restore the metadata from a backup")
    if values["version"] > FORMAT_VERSION:
        raise SchemaTooNew(
            f"volume {values.get('tenant')}/{values.get('name')} has format version {values['version']}, "
            f"this AtollFS knows up to {FORMAT_VERSION}: upgrade AtollFS"
        )
    wrong = sorted(
        (_REQUIRED - values.keys())
        | (values.keys() - _FIELDS.keys())
        | {name for name in values.keys() & _FIELDS.keys() if not _fits(name, values[name])}
    )
    if wrong:
        raise StoreError(
            f"the stored format of a volume has missing, unknown or ill-typed fields: {', '.join(wrong)}; "
            "restore the metadata from a backup"
        )
    return VolumeFormat(**values)


def check_same_volume(stored: VolumeFormat, replacement: VolumeFormat) -> None:
    """Raise ValueError if a format would move a volume to another tenant, name or uuid."""
    for name in ("tenant", "name", "uuid"):
        if getattr(stored, name) != getattr(replacement, name):
            raise ValueError(f"put_format() cannot change the {name} of a volume")


def _fits(name: str, value: object) -> bool:
    # Field types are text here because of `from __future__ import annotations` in the model.
    expected = _TYPES.get(str(_FIELDS[name].type))
    return expected is None or (isinstance(value, expected) and (expected is bool or not isinstance(value, bool)))
