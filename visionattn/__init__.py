"""Attention in computer vision: train models that attend, see where they looked, and measure whether to believe it.

    import visionattn as va

    va.overlay(model, "cat.jpg")      draw where a model looked, as a PIL image
    va.heatmap(model, "cat.jpg")      the heatmap with its numbers: values, prediction, peak
    va.explore(model, ["cat.jpg"])    a page to explore patches, heads, layers and methods, with their scores
    va.insert(model, mechanism)       insert an attention mechanism into a model
    va.load("best.ckpt")              load the task of a run, whose `network` is the model

Names and sub-packages are imported on first use, so `import visionattn` itself costs almost nothing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
