"""Where the token for a service comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.volume import TokenMissing, read_token


def test_a_file_that_is_named_comes_before_the_environment_and_a_token_there_before_a_file(tmp_path: Path) -> None:
    for name in ("named", "default"):
        (tmp_path / name).write_text(f"{name}\n")
    everything = {"ATOLL_TOKEN": "token\n", "ATOLL_TOKEN_FILE": str(tmp_path / "default")}
    assert read_token(str(tmp_path / "named"), env=everything) == "named"
    assert read_token(None, env=everything) == "token"
    assert read_token(None, env={**everything, "ATOLL_TOKEN": " "}) == "default"


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file"), (b"\n", "is empty"), (b"\xff", "no text"), ("", "there is no token")],
)
def test_what_is_wrong_is_told_with_the_remedy(tmp_path: Path, content: bytes | str | None, reason: str) -> None:
    path = tmp_path / "token"
    if isinstance(content, bytes):
        path.write_bytes(content)
    env = {} if content == "" else {"ATOLL_TOKEN_FILE": str(path)}
    with pytest.raises(TokenMissing, match=f"{reason}.*ATOLL_TOKEN_FILE"):
        read_token(None, env=env)
