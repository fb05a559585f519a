"""Sizes as people write them: 5GB, 512MiB, 1000000. Decimal units are powers of 1000, those with an i of 1024."""

from __future__ import annotations

from weightsmith.errors import UsageError

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {_letter: 1000**_power, f"{_letter}B": 1000**_power}
    _UNITS |= {f"{_letter}I": 1024**_power, f"{_letter}IB": 1024**_power}


def parse_size(value: str | int) -> int:
    """The size in bytes, above zero; raises UsageError for anything else."""
    if isinstance(value, int):
        nbytes = value
    else:
        text = value.strip().upper()
        digits = text.rstrip("KMGTIB")
        try:
            nbytes = int(float(digits) * _UNITS[text[len(digits) :].strip()])
        except (ValueError, KeyError, OverflowError) as error:
            raise UsageError(f"{value!r} is no size; write for instance 5GB or 512MiB") from error
    if nbytes <= 0:
        raise UsageError(f"{value!r} must be above zero")
    return nbytes


def spelled(nbytes: int) -> str:
    """A size for people to read: "713 B", "4.20 kB", "140.31 GB"."""
    size, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{nbytes} B" if unit == "B" else f"{size:.2f} {unit}"
