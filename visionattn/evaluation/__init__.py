"""Metrics of heatmaps: faithfulness, localisation and randomisation, and controls that do not depend on the model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
