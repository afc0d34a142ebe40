"""Arrays are encoded and compared with the result of a slow decoder, written from the format's description."""

import json

import numpy as np
import pytest

from tests.explorer.unpacked import array, numbers, rows_of
from visionattn.explorer.encoding import LEVELS, EncodedArrays, Rows


def encode_and_decode(values, levels):
    """Return the decoded values and the span of each row."""
    pack = EncodedArrays()
    pack.add(np.arange(3, dtype=np.uint8))  # three bytes, so that the next arrays are not aligned to four bytes
    description = json.loads(json.dumps(Rows.of(values).encode_into(pack, levels)))
    return rows_of(numbers(pack.text), description)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("sharpness", [0.02, 1, 8])
def test_the_error_of_a_weight_is_at_most_half_a_level(levels, sharpness):
    random = np.random.default_rng(levels)
    logits = sharpness * random.normal(size=(40, 37))
    values = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found, spans = encode_and_decode(values, levels)
    assert (np.abs(found - values) <= spans[:, None] / (2 * (levels - 1)) * 1.001 + 1e-6).all()
    assert (spans <= values.max(1) - values.min(1) + 0.005 * values.max(1)).all()


def test_rows_of_zeros_and_of_equal_values_are_encoded():
    found, _ = encode_and_decode(np.array([[0, 0, 0.0], [0.25, 0.25, 0.25], [0, 1, 0], [1e-11, 0, 0]]), 4)
    np.testing.assert_allclose(found, [[0, 0, 0], [0.25, 0.25, 0.25], [0, 1, 0], [0, 0, 0]], atol=0.25 / 256)


def test_arrays_are_decoded_unchanged():
    random = np.random.default_rng(0)
    arrays = [
        random.integers(0, 256, (3, 5)).astype(np.uint8),
        random.integers(-9, 9, 7).astype(np.int32),
        random.normal(size=(2, 3)).astype(np.float32),
    ]
    pack = EncodedArrays()
    refs = [pack.add(values) for values in arrays]
    content = numbers(pack.text)
    for values, ref in zip(arrays, refs, strict=True):
        np.testing.assert_array_equal(array(content, ref), values)
