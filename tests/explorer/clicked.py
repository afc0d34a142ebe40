"""What is clicked in a page, and the values that are then seen."""

import numpy as np


def values(page):
    return np.array(page.evaluate("Array.from(SHOWN[state.view]().map.values)"))
