"""What every test may count on: the servers' fixtures, one printed seed, hypothesis without timings."""

from __future__ import annotations

import asyncio
import inspect
import os
import random
import secrets
import signal
from collections.abc import Awaitable

import pytest
from hypothesis import HealthCheck, settings

from tests.closing import close_all

pytest_plugins = ["tests.servers.fixtures", "tests.mount.stores"]

_SEED_VARIABLE = "ATOLL_TEST_SEED"
_SEED = int(os.environ.get(_SEED_VARIABLE) or secrets.randbits(32))

# Timings are never asserted: two busy cores would make them random.
settings.register_profile("atoll", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("atoll")


@pytest.hookimpl(tryfirst=True)  # before hypothesis reads its option
def pytest_configure(config: pytest.Config) -> None:
    """Give hypothesis the run's seed, and clean up on SIGTERM as on Control-C: else servers and mounts would stay behind."""
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(_SEED)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Processes that share the tests (pytest-xdist) make the same choices.
    os.environ[_SEED_VARIABLE] = str(_SEED)


def pytest_runtest_setup() -> None:
    """Give each test the same random bytes, whichever tests ran before it."""
    random.seed(_SEED)


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
    asyncio.run(_run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names})))
    return True


async def _run(test: Awaitable[None]) -> None:
    try:
        await test
    finally:
        await close_all()
