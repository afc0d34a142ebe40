"""A slow decoder of the arrays in the explorer's page, written from the description in explorer/encoding.py."""

import base64
import zlib

import numpy as np


def numbers(text):
    """Return the bytes of a pack of arrays."""
    return zlib.decompress(base64.b64decode(text))


def array(content, ref):
    """Return one array of a pack."""
    kind = {"u1": np.uint8, "i1": np.int8, "u2": "<u2", "i4": "<i4", "f4": "<f4"}[ref["kind"]]
    return np.frombuffer(content, kind, int(np.prod(ref["shape"])), ref["at"]).reshape(ref["shape"])


def rows_of(content, description, selected=None):
    """Return the values (R, K) and spans (R,) of all rows or the selected rows, decoded one number at a time."""
    top, base, codes = (array(content, description[name]) for name in ("top", "base", "codes"))
    levels, length, each = description["levels"], description["length"], 1
    while levels ** (each + 1) <= 256:
        each += 1
    values, spans = np.zeros((len(top), length)), np.zeros(len(top))
    for row in range(len(top)) if selected is None else selected:
        high = 0 if top[row] == 65_535 else 2 ** (-int(top[row]) / 2048)
        low = high * int(base[row]) / 256
        spans[row] = high - low
        for column in range(length):
            byte, digit = divmod(row * length + column, each)
            code = int(codes[byte]) // levels**digit % levels
            values[row, column] = low + code / (levels - 1) * (high - low)
    return values, spans
