"""Just enough of protobuf's wire format to read and write a SentencePiece model.

A message is a row of fields. A field is a number, a kind and a value: an integer in groups of 7
bits (kind 0), 8 bytes (1), a length and so many bytes (2), or 4 bytes (5). Integers and keys are
least significant group first. Source: protobuf.dev/programming-guides/encoding.
"""

import struct
from collections.abc import Iterator


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """`(number, value)` of every field: an int, or bytes. Raises `ValueError` where one is cut."""
    position = 0
    while position < len(message):
        key, position = read_int(message, position)
        kind = key & 7
        if kind == 0:
            value, position = read_int(message, position)
        else:
            size = {1: 8, 5: 4}.get(kind)
            if kind == 2:
                size, position = read_int(message, position)
            if size is None or position + size > len(message):
                raise ValueError(f"no protobuf message: kind {kind} at byte {position}")
            value = message[position : position + size]
            position += size
        yield key >> 3, value


def read_int(message: bytes, position: int) -> tuple[int, int]:
    """The integer that begins at a position, and the position after it."""
    value = shift = 0
    while position < len(message) and shift < 70:
        byte = message[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
    raise ValueError(f"no protobuf message: an integer is cut at byte {position}")


def field(number: int, value: int | float | str | bytes) -> bytes:
    """One encoded field; value: int or bool (not negative), float (as 4 bytes), str or bytes."""
    if isinstance(value, float):
        return encoded_int(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return encoded_int(number << 3) + encoded_int(value)
    value = value.encode() if isinstance(value, str) else value
    return encoded_int(number << 3 | 2) + encoded_int(len(value)) + value


def encoded_int(value: int) -> bytes:
    """An integer in groups of 7 bits."""
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
