"""Label Studio's run-length code of brush strokes: the code of the JavaScript package @thi.ng/rle-pack over RGBA pixels, row by row.

Head: 32 bits number of values, 5 bits word size - 1, four times 4 bits: sizes of a length - 1. Then chunks: 1 bit (1 = one value
repeated), 2 bits which size, that many bits length - 1, and the value, or so many values. Label Studio reads the fourth channel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grex_mllm.errors import fault
from grex_mllm.ops.masks import check_size

CHANNELS = 4
WORD = 8
LENGTH_BITS = (3, 4, 8, 16)
HEAD_BITS = 32 + 5 + 4 * len(LENGTH_BITS)


def encode_brush(mask: np.ndarray) -> list[int]:
    """Return the code, bytes as integers, of a bool [H, W] mask."""
    flat = mask.reshape(-1)
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts = np.concatenate([[0], edges])
    lengths = np.diff(np.concatenate([starts, [flat.size]])) * CHANNELS
    bits = [f"{flat.size * CHANNELS:032b}", f"{WORD - 1:05b}", *(f"{size - 1:04b}" for size in LENGTH_BITS)]
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        value = "1" * WORD if flat[start] else "0" * WORD
        while length > 0:
            part = min(length, 1 << LENGTH_BITS[-1])
            which = next(i for i, size in enumerate(LENGTH_BITS) if part <= 1 << size)
            bits.append(f"1{which:02b}{part - 1:0{LENGTH_BITS[which]}b}{value}")
            length -= part
    code = "".join(bits)
    code += "0" * (-len(code) % 8)
    return [int(code[i : i + 8], 2) for i in range(0, len(code), 8)]


def decode_brush(code: Sequence[int], height: int, width: int) -> np.ndarray:
    """Return bool [H, W]: where the fourth channel is above 0.

    Raises:
        GrexError: not bytes, of another size than [height, width], or cut off.
    """
    check_size(height, width)
    if not isinstance(code, list) or not all(type(value) is int and 0 <= value <= 255 for value in code):
        raise fault("a brush code that is no list of bytes", "whole numbers from 0 to 255", "export the annotations again, as JSON")
    bits = np.unpackbits(np.array(code, np.uint8))
    reader = _Bits(bits)
    total, word = reader.number(32), reader.number(5) + 1
    sizes = [reader.number(4) + 1 for _ in LENGTH_BITS]
    if total != height * width * CHANNELS or word != WORD:
        given = f"a brush code of {total} values of {word} bits"
        raise fault(given, f"{height * width * CHANNELS} of {WORD}: {height}x{width} pixels", "check original_width and original_height")
    values, filled = np.zeros(total, np.uint8), 0
    while filled < total:
        repeated = reader.number(1)
        length = reader.number(sizes[reader.number(2)]) + 1
        if filled + length > total:
            raise fault("a brush code whose runs go beyond its size", f"{total} values", "export the annotations again")
        values[filled : filled + length] = reader.number(WORD) if repeated else np.packbits(reader.take(length * WORD))
        filled += length
    return values.reshape(height, width, CHANNELS)[..., CHANNELS - 1] > 0


class _Bits:
    def __init__(self, bits: np.ndarray) -> None:
        self.bits, self.place = bits, 0

    def take(self, number: int) -> np.ndarray:
        if self.place + number > len(self.bits):
            raise fault("a brush code that is cut off", "all of it", "export the annotations again")
        self.place += number
        return self.bits[self.place - number : self.place]

    def number(self, size: int) -> int:
        return int("".join(map(str, self.take(size).tolist())), 2)
