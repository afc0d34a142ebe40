"""Heatmap methods: from a model and images to heatmaps of where the model looked."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
