"""Example code of a user, with public names only. mypy checks the types, and test_package.py runs the code."""

from pathlib import Path

import torch
from PIL import Image
from torch import nn
from typing_extensions import assert_type

import visionattn as va
from visionattn.attention import CBAM
from visionattn.data import Placement, Preprocess
from visionattn.evaluation import RandomMap, Scores, score
from visionattn.maps import METHODS, GradCAM, Heatmaps, Method
from visionattn.overlays import Explainer


def use(model: nn.Module, picture: Path, folder: Path) -> None:
    """Explain a model whose inputs have 32 × 32 pixels, and write a page into the folder."""
    preprocess = Preprocess(32)
    heatmap = va.heatmap(model, picture, preprocess=preprocess)
    assert_type(heatmap, va.Heatmap)
    assert_type(heatmap.probability, float | None)
    assert_type(va.overlay(model, picture, preprocess=preprocess), Image.Image)

    inserted = va.insert(model, CBAM, at="0")
    inserted.remove()

    values, placement = preprocess(va.data.read_image(picture))
    assert_type(placement, Placement)
    maps = GradCAM()(model, torch.from_numpy(values)[None], target=1)
    assert_type(maps, Heatmaps)
    assert_type(maps.heatmaps, torch.Tensor)
    assert_type(METHODS["gradcam"], type[Method])

    controls: dict[str, Method] = {"random": RandomMap((4, 4))}
    scores = score(model, [{"image": torch.from_numpy(values)[None]}], controls, steps=2, copies=1)
    assert_type(scores, Scores)

    va.explore(model, [picture], preprocess=preprocess, steps=2).save(folder / "page.html")
    Explainer(model, preprocess, method=GradCAM())
