"""Fixtures of the command line's tests: those of real mounts."""

from tests.mount.conftest import mounted_volume

__all__ = ["mounted_volume"]
