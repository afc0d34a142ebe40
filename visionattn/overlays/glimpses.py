"""Record the glimpses of a network in pixels of the source image, for pictures, animations and explorer pages.

Shapes: B images, T glimpses, S scales, C channels, h × w values of a patch, K classes, H × W the model's input.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from visionattn.capture import undisturbed
from visionattn.data import Placement, Preprocess
from visionattn.drawing import boxes_in_source, centres
from visionattn.maps import check_images
from visionattn.models import GlimpseNetwork, LocationMode
from visionattn.overlays.outputs import GlimpseTrace


def trace_glimpses(
    network: GlimpseNetwork,
    images_BCHW: Tensor,
    placements: Sequence[Placement],
    preprocess: Preprocess,
    *,
    locations: LocationMode = "mean",
) -> list[GlimpseTrace]:
    """Run a glimpse network on images and record its glimpses.

    Args:
        network: the glimpse network; it is left unchanged.
        images_BCHW: normalised as the network expects.
        placements: for each image, the placement of the source in the model's input.
        preprocess: turns patches back into pictures.
        locations: how locations are chosen, as in `GlimpseNetwork.rollout`.

    Returns:
        One `GlimpseTrace` per image: `locations` (T, 2) xy and `boxes` (T, S, 4) xyxy in pixels of the source,
        `patches` (T, S, h, w, 3) uint8 RGB, and `probabilities` (T, K) after each glimpse. A location is the centre of
        the glimpse's finest box. Boxes may reach beyond the source.

    Raises:
        UsageError: the images are not a batch (B, C, H, W) of floating point.
        DataError: the batch is empty, or holds NaN or infinity.
    """
    check_images(images_BCHW)
    with undisturbed(network):
        rollout = network.rollout(images_BCHW, locations=locations)
        location_BT2 = rollout.location[:, 0]
        size = images_BCHW.shape[-2], images_BCHW.shape[-1]
        boxes_BTS4 = network.retina.boxes(location_BT2, size).float().cpu().numpy()
        patches_BTSChw = network.retina(images_BCHW, location_BT2).float().cpu().numpy()
        probabilities_BTK = rollout.logits[:, 0].float().softmax(-1).cpu().numpy()
    traces: list[GlimpseTrace] = []
    for index, placement in enumerate(placements):
        boxes_TS4 = boxes_in_source(boxes_BTS4[index], placement)
        patches_NChw = patches_BTSChw[index].reshape(-1, *patches_BTSChw.shape[3:])
        pictures = np.stack([preprocess.denormalise(patch_Chw) for patch_Chw in patches_NChw])
        traces.append(
            {
                "locations": centres(boxes_TS4),
                "boxes": boxes_TS4,
                "patches": pictures.reshape(*patches_BTSChw.shape[1:3], *pictures.shape[1:]),
                "probabilities": probabilities_BTK[index],
            }
        )
    return traces
