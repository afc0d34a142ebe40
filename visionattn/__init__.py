"""Attention in computer vision: train models with attention, draw their heatmaps, and test the heatmaps.

    import visionattn as va

    va.overlay(model, "cat.jpg")      draw a heatmap over the image; returns a PIL image
    va.heatmap(model, "cat.jpg")      compute the heatmap as an array, with the prediction and the peak
    va.explore(model, ["cat.jpg"])    make a page to explore patches, heads, layers and heatmap methods
    va.insert(model, mechanism)       insert an attention mechanism into a model
    va.load_model("hf:OWNER/NAME")    load a model by its name, with its preprocessing and class names
    va.load("best.ckpt")              load a trained task from a checkpoint; `task.network` is the model

Names and sub-packages are imported on first use, so `import visionattn` is fast.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
