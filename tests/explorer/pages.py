"""Read the data of a page from its HTML."""

import json
import re

import numpy as np

from tests.explorer.unpacked import array, numbers, rows_of


def facts(page):
    """Return the JSON data of a page."""
    return json.loads(re.search(r'<script type="application/json" id="facts">(.*?)</script>', page.html, re.S)[1])


def content(page, image=0):
    """Return the bytes of an image's arrays."""
    return numbers(re.search(rf'id="numbers-{image}">([^<]*)<', page.html)[1])


def weights_on_page(page, layer, image=0):
    """Return the weights (W, H, Q, K) of a layer, with keys in the order of the page, and the cell of each key."""
    attention = facts(page)["pictures"][image]["attention"][layer]
    parts = [rows_of(content(page, image), part)[0] for part in attention["rows"]]
    windows, queries = attention["queries"]["shape"]
    shape = windows, attention["heads"], queries, -1
    return np.concatenate(parts, 1).reshape(shape), array(content(page, image), attention["keys"])
