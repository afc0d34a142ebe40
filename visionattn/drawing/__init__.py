"""Heatmaps, boxes and glimpses as pictures. NumPy, OpenCV and Pillow; no torch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
