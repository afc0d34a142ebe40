"""Test attention under a custom mask: only blocks with an allowed pair are computed."""

import pytest
import torch

from tests.attention.self_attention.attended_by_hand import MASKED, attended, weights_by_hand
from tests.attention.self_attention.forms import ProductCounter, qkv
from visionattn import attention
from visionattn.errors import UsageError

close = torch.testing.assert_close


def test_mask_that_leaves_a_patch_without_keys_raises():
    # patches of row 1 have no keys; `c == c` and the like are true everywhere, and give the mask its full shape
    module = attention.BlockSparse(1, allowed=lambda a, b, c, d: (a != 1) & (c == c) & (b == b) & (d == d))
    with pytest.raises(UsageError, match=r"allowed leaves patch \(1, 0\) of a grid of 2×3 without a key"):
        module(*qkv((2, 3), 0, heads=1), grid=(2, 3))


def test_block_sparse_computes_only_blocks_with_an_allowed_pair():
    grid = (16, 16)
    # in bands of four rows, each of the 256 patches attends to 64 patches; `b == b` and `d == d` are true everywhere
    bands = attention.BlockSparse(2, allowed=lambda a, b, c, d: (a // 4 == c // 4) & (b == b) & (d == d), block=16)
    with torch.no_grad(), ProductCounter() as counter:
        bands(*qkv(grid, 0), grid=grid)
    assert counter.products == 2 * 2 * 256 * 64  # two images, two heads


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("prefix", [0, 3])
def test_flex_attention_gets_the_same_mask(prefix):
    from torch.nn.attention.flex_attention import flex_attention

    make, m = MASKED["block-sparse"]
    grid, module = (5, 7), make(2)
    inputs = [x.detach() for x in qkv(grid, prefix, width=16)]
    out = flex_attention(*inputs, block_mask=module.flex_mask(grid, prefix, inputs[0].device))
    expected, _ = attended(*inputs, weights_by_hand(m, 2, grid, prefix))
    close(out.double(), expected, atol=1e-5, rtol=0)
