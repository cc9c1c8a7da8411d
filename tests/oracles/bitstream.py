"""A stream of codes, written and read bit by bit."""

from __future__ import annotations


def write(codes: list[int], bits: int) -> list[int]:
    """Signed 32-bit words holding ``code + 2^(bits-1)`` of each code, least significant bit first."""
    stream = []
    for code in codes:
        unsigned = code + 2 ** (bits - 1)
        stream += [(unsigned >> position) & 1 for position in range(bits)]
    while len(stream) % 32:
        stream.append(0)
    words = []
    for start in range(0, len(stream), 32):
        word = sum(bit << position for position, bit in enumerate(stream[start : start + 32]))
        words.append(word - 2**32 if word >= 2**31 else word)
    return words


def read(words: list[int], bits: int, count: int) -> list[int]:
    """The inverse of `write`."""
    stream = [(word >> position) & 1 for word in words for position in range(32)]
    codes = []
    for index in range(count):
        part = stream[index * bits : (index + 1) * bits]
        codes.append(sum(bit << position for position, bit in enumerate(part)) - 2 ** (bits - 1))
    return codes
