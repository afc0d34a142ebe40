"""The explorer: an HTML page that shows a model's attention and heatmaps on some images."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
