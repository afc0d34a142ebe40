"""A slow decoder of the page's arrays, written from the format's description."""

import base64
import zlib

import numpy as np


def numbers(text):
    return zlib.decompress(base64.b64decode(text))


def array(content, ref):
    kind = {"u1": np.uint8, "i1": np.int8, "u2": "<u2", "i4": "<i4", "f4": "<f4"}[ref["kind"]]
    return np.frombuffer(content, kind, int(np.prod(ref["shape"])), ref["at"]).reshape(ref["shape"])


def rows_of(content, told, some=None):
    """Return the values (R, K) and spans (R,) of all rows or a selection, decoded one number at a time."""
    top, base, codes = (array(content, told[name]) for name in ("top", "base", "codes"))
    levels, length, each = told["levels"], told["length"], 1
    while levels ** (each + 1) <= 256:
        each += 1
    values, spans = np.zeros((len(top), length)), np.zeros(len(top))
    for row in range(len(top)) if some is None else some:
        high = 0 if top[row] == 65_535 else 2 ** (-int(top[row]) / 2048)
        low = high * int(base[row]) / 256
        spans[row] = high - low
        for place in range(length):
            byte, turn = divmod(row * length + place, each)
            code = int(codes[byte]) // levels**turn % levels
            values[row, place] = low + code / (levels - 1) * (high - low)
    return values, spans
