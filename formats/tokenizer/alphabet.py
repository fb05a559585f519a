"""The byte alphabet of GPT-2: one printable character for each of the 256 bytes.

Bytes that print in Latin-1 (33-126, 161-172, 174-255) stand for themselves, the other 68 take the code points from 256
upwards in order; the space, byte 32, becomes U+0120. Tokens of a byte-level BPE are written in it, so every token is
text even where it cuts a UTF-8 sequence. Reference: openai/gpt-2, src/encoder.py, bytes_to_unicode.
"""

from __future__ import annotations

_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]

BYTE_TO_CHAR: tuple[str, ...] = tuple(
    chr(byte) if byte in _PRINTABLE else chr(256 + _OTHERS.index(byte)) for byte in range(256)
)
CHAR_TO_BYTE: dict[str, int] = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}


def to_chars(data: bytes) -> str:
    """Write bytes in the alphabet."""
    return "".join(BYTE_TO_CHAR[byte] for byte in data)


def to_bytes(token: str) -> bytes | None:
    """Read a token back; None if it holds a character outside the alphabet (then it is no byte-level token)."""
    try:
        return bytes(CHAR_TO_BYTE[char] for char in token)
    except KeyError:
        return None
