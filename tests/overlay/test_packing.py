"""Numbers of a page, unpacked by a slow loop from the format's own words."""

import base64
import json
import zlib

import numpy as np
import pytest

from visionattn.overlay.packing import LEVELS, Pack, Rows


def numbers(text):
    return zlib.decompress(base64.b64decode(text))


def array(content, ref):
    kind = {"u1": np.uint8, "i1": np.int8, "u2": "<u2", "i4": "<i4", "f4": "<f4"}[ref["kind"]]
    return np.frombuffer(content, kind, int(np.prod(ref["shape"])), ref["at"]).reshape(ref["shape"])


def rows_of(content, told, some=None):
    """(R, K) values and (R,) spans as the page reads them, one number after the other; of all rows or of some."""
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
            if told["forecast"]:
                left, right = (array(content, told["forecast"][side]).astype(int) for side in ("left", "right"))
                group, query = divmod(row, left.shape[2])
                forecast = (left[:, group, query] * right[:, group, place]).sum() / 2 ** told["forecast"]["shift"]
                code = (code + min(max(int(np.floor(forecast + 0.5)), 0), levels - 1)) % levels
                code = min(max(code + min(max(forecast - code, -0.25), 0.25), 0), levels - 1)
            values[row, place] = low + code / (levels - 1) * (high - low)
    return values, spans


def packed(values, levels, group=1):
    pack = Pack()
    pack.add(np.arange(3, dtype=np.uint8))  # so that nothing lies where four bytes would like it
    told = json.loads(json.dumps(Rows.of(values, group=group).add_to(pack, levels)))
    return rows_of(numbers(pack.text), told)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("sharpness", [0.02, 1, 8])
def test_a_weight_is_off_by_half_a_level_at_most(levels, sharpness):
    random = np.random.default_rng(levels)
    logits = sharpness * random.normal(size=(40, 37))
    values = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found, spans = packed(values, levels)
    assert (np.abs(found - values) <= spans[:, None] / (2 * (levels - 1)) * 1.001 + 1e-6).all()
    assert (spans <= values.max(1) - values.min(1) + 0.005 * values.max(1)).all()


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("sharpness", [0.02, 1, 8])
def test_a_forecast_leaves_three_quarters_of_a_level_at_most(levels, sharpness):
    random = np.random.default_rng(levels)
    logits = sharpness * (random.normal(size=(2, 100, 3)) @ random.normal(size=(2, 3, 97))).reshape(200, 97) / 2
    values = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    rows = [0, 57, 99, 100, 199]  # the loop is slow
    pack = Pack()
    told = Rows.of(values, group=100).add_to(pack, levels)
    assert told["forecast"]
    found, spans = rows_of(numbers(pack.text), told, rows)
    error = np.abs(found - values)[rows]
    assert (error <= spans[rows, None] * 0.75 / (levels - 1) * 1.001 + 1e-6).all()


def test_a_forecast_makes_rows_that_are_alike_smaller():
    random = np.random.default_rng(0)
    logits = random.normal(size=(200, 2)) @ random.normal(size=(2, 200)) / 2 + 0.02 * random.normal(size=(200, 200))
    values = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    sizes, errors = [], []
    for group in (1, 200):
        pack = Pack()
        told = Rows.of(values, group=group).add_to(pack, 8)
        found, spans = rows_of(numbers(pack.text), told, range(5))
        sizes.append(len(pack.text))
        errors.append(((found - values)[:5] / spans[:5, None]).std())
    assert sizes[1] < 0.75 * sizes[0]
    assert errors[1] < 0.9 * errors[0]


def test_rows_of_zeros_and_of_equal_values():
    found, _ = packed(np.array([[0, 0, 0.0], [0.25, 0.25, 0.25], [0, 1, 0], [1e-11, 0, 0]]), 4)
    np.testing.assert_allclose(found, [[0, 0, 0], [0.25, 0.25, 0.25], [0, 1, 0], [0, 0, 0]], atol=0.25 / 256)


def test_arrays_come_back_as_they_were():
    random = np.random.default_rng(0)
    arrays = [
        random.integers(0, 256, (3, 5)).astype(np.uint8),
        random.integers(-9, 9, 7).astype(np.int32),
        random.normal(size=(2, 3)).astype(np.float32),
    ]
    pack = Pack()
    refs = [pack.add(one) for one in arrays]
    content = numbers(pack.text)
    for one, ref in zip(arrays, refs, strict=True):
        np.testing.assert_array_equal(array(content, ref), one)
