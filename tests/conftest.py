"""What every test may count on: the servers' fixtures, one printed seed, hypothesis without timings."""

from __future__ import annotations

import asyncio
import inspect
import os
import secrets
import signal

import pytest
from hypothesis import settings

pytest_plugins = ["tests.servers.fixtures"]

_SEED_VARIABLE = "ATOLL_TEST_SEED"
_SEED = int(os.environ.get(_SEED_VARIABLE) or secrets.randbits(32))

# Timings are never asserted: two busy cores would make them random. Examples differ from run to run, in CI too;
# a failure prints the blob that repeats it.
settings.register_profile("atoll", deadline=None, print_blob=True, derandomize=False)
settings.load_profile("atoll")


def pytest_configure() -> None:
    """Clean up on SIGTERM as on Control-C: else servers and mounts of the tests would stay behind."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_report_header() -> str:
    """Show how to repeat this run's random choices."""
    return f"seed: {_SEED} (repeat with {_SEED_VARIABLE}={_SEED})"


@pytest.fixture
def seed() -> int:
    """Return the number from which a test's own random choices come; the header of the run shows it."""
    return _SEED


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine function on an event loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True
