"""Heatmaps, overlays and predictions as rows of a table, for engines that divide millions of images among machines."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
