"""Sizes as people read them."""

from __future__ import annotations

import pytest

from weightsmith.sizes import parse_size, spelled


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (4_200_000, "4.20 MB"),
        (140_310_000_000, "140.31 GB"),
        (10**16, "10000.00 TB"),
    ],
)
def test_they_are_spelled_in_units_of_a_thousand(nbytes: int, text: str) -> None:
    assert spelled(nbytes) == text
    assert not nbytes or parse_size(text) == nbytes
