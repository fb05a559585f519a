"""The checksum of packed rows: one number on every machine, another one for any byte or page that differs."""

from __future__ import annotations

import numpy as np
import pytest

from weightsmith.quant.checksum import checksum


@pytest.mark.parametrize("row_bytes", [1, 2, 12, 110, 210, 4096])
def test_every_byte_counts(row_bytes: int) -> None:
    rows = np.random.default_rng(row_bytes).integers(1, 256, (3, row_bytes), np.uint8)
    wanted = checksum(rows)
    assert checksum(np.asfortranarray(rows)) == wanted
    for at in range(0, rows.size, max(1, rows.size // 50)):
        other = rows.copy()
        other.flat[at] ^= 1 << (at % 8)
        assert checksum(other) != wanted
    assert checksum(rows[::-1]) != wanted
    lost = rows.copy()
    lost[1:] = 0  # pages that never reached the disk
    assert checksum(lost) != wanted


def test_is_the_same_on_every_machine() -> None:
    assert checksum(np.arange(64, dtype=np.uint8).reshape(2, 32)) == 3983893718
