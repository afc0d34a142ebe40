"""Methods with settings that make them quick."""

from visionattn.maps import METHODS

_SETTINGS = {
    "integrated_gradients": {"steps": 4},
    "occlusion": {"size": 24},
    "rise": {"masks": 24, "cells": 3},
    "smoothgrad": {"samples": 4},
}


def quick(name):
    """Return the method with default settings, or with fewer passes if it runs the model many times."""
    return METHODS[name](**_SETTINGS.get(name, {}))
