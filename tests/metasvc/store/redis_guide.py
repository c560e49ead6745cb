"""What the guide on Redis says that a user of the server must be allowed, for a test that it is enough."""

from __future__ import annotations

import re
from pathlib import Path

_GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "redis.md"


def rights_of_the_guide(prefix: str) -> list[str]:
    """Return the rules of ACL SETUSER in the guide, for the keys of a prefix."""
    (rules,) = re.findall(r"^ACL SETUSER atoll on >\S+ (.*)$", _GUIDE.read_text(), flags=re.MULTILINE)
    return [rule.replace("~atoll:", f"~{prefix}:") for rule in rules.split()]
