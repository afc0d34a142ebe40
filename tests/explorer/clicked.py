"""Values that the page shows after clicks."""

import numpy as np


def values(page):
    return np.array(page.evaluate("Array.from(SHOWN[state.view]().map.values)"))
