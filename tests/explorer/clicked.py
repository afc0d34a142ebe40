"""Read the values that the page shows at the moment."""

import numpy as np


def values(page):
    """Return the values of the map on the picture, as a flat array."""
    return np.array(page.evaluate("Array.from(SHOWN[state.view]().map.values)"))
