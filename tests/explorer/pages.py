"""The data of a page, read from its text."""

import json
import re

import numpy as np

from tests.explorer.unpacked import array, numbers, rows_of


def facts(page):
    return json.loads(re.search(r'<script type="application/json" id="facts">(.*?)</script>', page.html, re.S)[1])


def content(page, image=0):
    return numbers(re.search(rf'id="numbers-{image}">([^<]*)<', page.html)[1])


def weights_told(page, layer, image=0):
    """Return the weights (W, H, Q, K) of a layer, with keys in the order of the page, and the keys' cells."""
    told = facts(page)["pictures"][image]["attention"][layer]
    parts = [rows_of(content(page, image), part)[0] for part in told["rows"]]
    windows, queries = told["queries"]["shape"]
    shape = windows, told["heads"], queries, -1
    return np.concatenate(parts, 1).reshape(shape), array(content(page, image), told["keys"])
