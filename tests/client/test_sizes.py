"""Sizes as users write and read them."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from client.sizes import MAX_SIZE_BYTES, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1B", 1),
        ("64KiB", 64 << 10),
        ("64K", 64 << 10),
        ("4 MiB", 4 << 20),
        ("1.5GiB", 3 << 29),
        ("1T", 1 << 40),
        ("2TiB", 2 << 40),
        ("10kB", 10_000),
        ("10KB", 10_000),
        ("10MB", 10_000_000),
        ("1GB", 10**9),
        ("1TB", 10**12),
        (f"{MAX_SIZE_BYTES}", MAX_SIZE_BYTES),
    ],
)
def test_sizes_with_and_without_units_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "x", "-1", "1.5", "1 2", "64k", "64kib", "1XB", "KiB", "1e9", "9EiB", f"{1 << 63}", "1٣"]
)
def test_what_is_no_size_is_refused_with_the_remedy(text: str) -> None:
    with pytest.raises(ValueError, match=r"give|write"):
        parse_size(text)


@given(number=st.integers(0, 1 << 20), unit=st.sampled_from(["", "KiB", "MiB", "GiB", "TiB", "kB", "MB", "GB", "TB"]))
def test_every_unit_multiplies_as_its_letter_says(number: int, unit: str) -> None:
    power = "KMGT".index(unit[0].upper()) + 1 if unit else 0
    assert parse_size(f"{number}{unit}") == number * (1024 if "i" in unit else 1000) ** power


@given(st.integers(0, MAX_SIZE_BYTES))
@example(1280)
@example(MAX_SIZE_BYTES)
def test_a_shown_size_is_within_a_twentieth_of_its_unit(size: int) -> None:
    shown, unit = format_size(size).split(" ")
    power = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"].index(unit)
    assert Fraction(shown) < 1024
    # In fractions, because the farthest sizes lie on the bound (1280 is "1.2 KiB"); the rest is what a float rounds.
    assert abs(Fraction(shown) - Fraction(size, 1024**power)) <= Fraction(1, 20) + Fraction(1, 1 << 40)
