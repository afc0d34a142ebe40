"""A small ViT and its attention weights, a picture, and a browser page for the explorer's tests."""

import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import timm
import torch

from visionattn.data.placement import Preprocess

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# a class name with markup that must not run
HOSTILE = "</script><img src=x onerror=alert(1)><!--{{script}}&lt;\u2028'\""
CLASSES = ("owl", HOSTILE, "cup", "rose")
PREPROCESS = Preprocess((48, 64))


def vit(*, depth=3, heads=3, seed=0):
    """Return a ViT of 3 × 4 patches with large qkv weights, so that its attention differs between patches."""
    torch.manual_seed(seed)
    options = {"img_size": (48, 64), "embed_dim": 16 * heads, "num_heads": heads, "depth": depth, "num_classes": 4}
    model = timm.create_model("vit_tiny_patch16_224", **options).eval()
    for block in model.blocks:
        block.attn.qkv.weight.data *= 25
    return model


def photo(height=60, width=100, seed=0):
    """Return a picture of random blotches, so that patches differ."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (-(-height // 12), -(-width // 12), 3), dtype=np.uint8)
    return coarse.repeat(12, 0).repeat(12, 1)[:height, :width].copy()


def weights_of(model, picture):
    """Return the weights (L, H, N, N) that timm's own unfused attention computes."""
    weights = []
    handles = []
    for block in model.blocks:
        block.attn.fused_attn = False
        handles.append(block.attn.attn_drop.register_forward_hook(lambda module, args, out: weights.append(out[0])))
    with torch.no_grad():
        model(torch.from_numpy(PREPROCESS(picture)[0])[None])
    for block, handle in zip(model.blocks, handles, strict=True):
        block.attn.fused_attn = True
        handle.remove()
    return torch.stack(weights).double().numpy()


@contextmanager
def opened(browser, html, tmp_path, **context):
    """Open a page in the browser; fail if the page logs a message, makes a request or opens a dialog."""
    file = tmp_path / "page.html"
    file.write_text(html, encoding="utf-8")
    troubles = []
    tab = browser.new_context(**context)
    page = tab.new_page()
    page.set_default_timeout(60_000)
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("dialog", lambda dialog: (troubles.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: request.url.startswith("data:") or troubles.append(request.url))
    page.goto(file.as_uri())
    troubles.remove(file.as_uri())
    page.wait_for_selector("body[data-ready]")
    yield page
    settle(page)
    tab.close()
    assert troubles == []


def settle(page):
    """Wait until the page has been drawn again."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


needs_browser = pytest.mark.skipif(
    CHROMIUM is None,
    reason="the scripts of the page run only in a browser, and none was found: apt-get install chromium",
)
