"""Heatmap methods: each turns a model and images into heatmaps."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
