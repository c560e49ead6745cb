"""Show the values of a failed comparison in the modules that hold checks but no tests of their own."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.metasvc.store.contract")
