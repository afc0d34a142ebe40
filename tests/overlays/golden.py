"""A golden image with one small picture of every kind of output, to detect changes of the drawing.

python -m tests.overlays.golden     write golden.png again
"""

import io
import json
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, PngImagePlugin

from visionattn.data import Placement
from visionattn.drawing import Style
from visionattn.overlays.outputs import OUTPUTS, ExplainedImage, OutputScene

FILE = Path(__file__).with_suffix(".png")
SIDE = 192  # pixels of the longer side of a picture in the sheet
STEP = 4  # colours are rounded down to multiples of STEP, so that the file stays small
TOLERANCE = 3 * STEP  # largest difference of colours that count as equal
# largest fraction of pixels that may differ, and that may differ much: fonts change a little between versions of Pillow
FRACTION, MUCH, FRACTION_MUCH = 0.01, 60, 0.003


def picture():
    """A picture of 120 × 180 with a blue half, a green half and a light square."""
    image_HWC = np.empty((120, 180, 3), np.uint8)
    image_HWC[:, :90], image_HWC[:, 90:] = (40, 70, 150), (60, 120, 50)
    image_HWC[30:70, 50:90] = 220
    return image_HWC


def explanation(name, row, column):
    """An explanation with everything that kinds of output can need. Its heatmap is hottest at one cell."""
    rows, columns = np.mgrid[:4, :4]
    heatmap_hw = np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / 2).astype(np.float32)
    placement = Placement(np.array([[4 / 15, 0, -8], [0, 4 / 15, 0]]), (120, 180), (32, 32))  # a centre crop
    boxes_TS4 = np.array([[[4, 4, 12, 12], [0, 0, 16, 16]], [[16, 12, 24, 20], [12, 8, 28, 24]]], np.float32)
    trace = {
        "locations": np.array([[60.0, 30.0], [105.0, 60.0]]),
        "boxes": 2.5 * np.array([[[18, 6, 30, 18], [12, 0, 36, 24]], [[36, 18, 48, 30], [30, 12, 54, 36]]]),
        "patches": np.full((2, 2, 4, 4, 3), 1, np.uint8)
        * np.array([[90, 160], [200, 250]], np.uint8)[..., None, None, None],
        "probabilities": np.array([[0.3, 0.7], [0.9, 0.1]], np.float32),
    }
    return ExplainedImage(
        name, "cat 0.90", heatmap_hw, 3 * heatmap_hw, placement, [[50.0, 30.0, 90.0, 70.0]], ["cat 0.90"], boxes_TS4,
        trace, ("cat", "dog"), heatmap_hw[None],
    )  # fmt: skip


def outputs(style=None):
    """Draw every kind of output: name → (H, W, 3) uint8 RGB."""
    style = style or Style(contours=(0.5,), caption=True)
    first, second = explanation("first", 1, 1), explanation("second", 2, 3)
    single = OutputScene(picture(), [first], style, boxes=[[100.0, 80.0, 170.0, 110.0]], labels=["thing"])
    several = OutputScene(picture(), [first, second], style)
    compared = OutputScene(picture(), [first, second], style, compared=True)
    scenes = {name: compared if kind.needs == "two models" else single for name, kind in OUTPUTS.items()} | {
        "overlay several": several,
        "overlay compared": compared,
    }
    return {name: as_picture(OUTPUTS[name.partition(" ")[0]].make(scene)) for name, scene in scenes.items()}


def as_picture(output):
    """Convert any output to (H, W, 3) uint8 RGB; an animation gives its last frame, and arrays give their heatmap."""
    if isinstance(output, bytes):
        with Image.open(io.BytesIO(output)) as animation:
            animation.seek(animation.n_frames - 1)
            return np.array(animation.convert("RGB"))
    if not isinstance(output, np.ndarray):
        output = np.rint(255 * output["heatmap"]).astype(np.uint8)
    if output.dtype == np.uint16:
        output = (output >> 8).astype(np.uint8)
    return output if output.ndim == 3 else np.repeat(output[..., None], 3, 2)


def small(image_HWC):
    """Shrink a picture to at most SIDE pixels a side, and round its colours to multiples of STEP."""
    scale = min(1, SIDE / max(image_HWC.shape[:2]))
    size = max(1, round(scale * image_HWC.shape[1])), max(1, round(scale * image_HWC.shape[0]))
    return np.minimum(cv2.resize(image_HWC, size, interpolation=cv2.INTER_AREA) // STEP * STEP, 255 // STEP * STEP)


def sheet(drawn):
    """Stack all pictures into one, with black to the right of narrow pictures."""
    rows = [small(image_HWC) for image_HWC in drawn.values()]
    page = np.zeros((sum(map(len, rows)), SIDE, 3), np.uint8)
    y = 0
    for row in rows:
        page[y : y + len(row), : row.shape[1]] = row
        y += len(row)
    return page


def write():
    """Write the golden image, with the size of every output in its metadata."""
    drawn = outputs()
    notes = PngImagePlugin.PngInfo()
    notes.add_text("sizes", json.dumps({name: image.shape[:2] for name, image in drawn.items()}))
    Image.fromarray(sheet(drawn)).save(FILE, optimize=True, pnginfo=notes)


def differences(drawn):
    """List the outputs that differ from the golden image, each with its difference."""
    with Image.open(FILE) as golden:
        sizes, page = json.loads(golden.text["sizes"]), np.array(golden)
    found = [f"{name} is new" for name in sorted(drawn.keys() - sizes.keys())]
    found += [f"{name} is gone" for name in sorted(sizes.keys() - drawn.keys())]
    found += [
        f"{name}: other size" for name, size in sizes.items() if name in drawn and tuple(size) != drawn[name].shape[:2]
    ]
    if found:
        return found
    y = 0
    for name, image_HWC in drawn.items():
        row = small(image_HWC)
        difference = np.abs(page[y : y + len(row), : row.shape[1]].astype(int) - row).max(-1)
        differs = (difference > TOLERANCE).mean()
        if differs > FRACTION or (difference > MUCH).mean() > FRACTION_MUCH:
            found.append(f"{name}: {differs:.1%} of its pixels")
        y += len(row)
    return found


if __name__ == "__main__":
    write()
