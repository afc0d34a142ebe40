"""Attention in computer vision: train models that attend, see where they looked, and measure whether to believe it.

    import visionattn as va

    va.overlay(model, "cat.jpg")      the picture that shows where a model looked
    va.heatmap(model, "cat.jpg")      the same with its numbers
    va.explore(model, ["cat.jpg"])    a page to explore it: patches, heads, layers, methods and how far to believe them
    va.insert(model, mechanism)       put a mechanism into a model
    va.load("best.ckpt")              the task of a run, whose `network` is the model

The names and the packages are imported when they are first used; `import visionattn` itself costs nothing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
