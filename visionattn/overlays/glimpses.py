"""What a glimpse network did with images, in pixels of their sources: for pictures, animations and pages.

Shapes: B images, T glimpses, S scales, C channels, h × w values of a patch, K classes, H × W the model's input.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from visionattn.capture.running import undisturbed
from visionattn.data.placement import Placement, Preprocess
from visionattn.drawing.scanpath import boxes_in_source, centres
from visionattn.maps.method import check_images
from visionattn.models.glimpse_network import GlimpseNetwork, Look


def follow_gaze(
    network: GlimpseNetwork,
    images_BCHW: Tensor,
    placements: Sequence[Placement],
    preprocess: Preprocess,
    *,
    look: Look = "mean",
) -> list[dict[str, NDArray[Any]]]:
    """Let a network look at images, and tell what it did.

    Args:
        network: it is left as it was.
        images_BCHW: normalised as the network wants them.
        placements: of the sources in the images.
        preprocess: by which the patches become pictures again.
        look: as `GlimpseNetwork.rollout` takes it.

    Returns:
        For each image `locations` (T, 2) xy and `boxes` (T, S, 4) xyxy in pixels of the source, `patches`
        (T, S, h, w, 3) uint8 RGB, and `probabilities` (T, K) after each glimpse. A location is the middle of what was
        seen sharply; boxes may reach out of the source.
    """
    check_images(images_BCHW)
    with undisturbed(network):
        rollout = network.rollout(images_BCHW, look=look)
        location_BT2 = rollout.location[:, 0]
        size = images_BCHW.shape[-2], images_BCHW.shape[-1]
        boxes_BTS4 = network.retina.boxes(location_BT2, size).float().cpu().numpy()
        patches_BTSChw = network.retina(images_BCHW, location_BT2).float().cpu().numpy()
        probabilities_BTK = rollout.logits[:, 0].float().softmax(-1).cpu().numpy()
    told = []
    for index, placement in enumerate(placements):
        boxes_TS4 = boxes_in_source(boxes_BTS4[index], placement)
        patches_NChw = patches_BTSChw[index].reshape(-1, *patches_BTSChw.shape[3:])
        pictures = np.stack([preprocess.denormalise(patch_Chw) for patch_Chw in patches_NChw])
        told.append(
            {
                "locations": centres(boxes_TS4),
                "boxes": boxes_TS4,
                "patches": pictures.reshape(*patches_BTSChw.shape[1:3], *pictures.shape[1:]),
                "probabilities": probabilities_BTK[index],
            }
        )
    return told
