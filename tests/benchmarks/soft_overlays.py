"""Draw heatmaps of networks with and without soft attention side by side, on the same pictures.

    python tests/benchmarks/soft_overlays.py --out sheet.jpg --images PICTURE … --runs runs/soft-none-0/0 …

Each row shows one picture and the heatmaps of every run: Grad-CAM at the last block and, if the network has gates over
positions, the last of these gates. Below each heatmap is the class that the run predicts, with a tick if the picture's
folder has this name.
"""

import argparse
from pathlib import Path

from visionattn.data import read_image, write_image
from visionattn.data.samples import prepare
from visionattn.drawing.overlay import blend
from visionattn.drawing.sheets import Tile, sheet
from visionattn.errors import UsageError
from visionattn.maps import Gate, GradCAM
from visionattn.training import load


def name_of(network):
    attention = {type(block.attention).__name__ for block in network.blocks} - {"Identity"}
    return "/".join(attention) or "no attention"


def tiles_of(path, tasks):
    picture, truth = read_image(path), path.parent.name
    tiles = [Tile(picture, [truth])]
    for method in (GradCAM("blocks"), Gate()):
        for task in tasks:
            sample = prepare(picture, task.preprocess)
            try:
                maps = method(task.network, sample["image"][None])
            except UsageError:  # the network has no gate over positions
                continue
            answer = task.class_names[int(maps.output.argmax())]
            placement = sample["placement"]
            overlay = blend(picture, placement.carry(maps.heatmaps[0].numpy(), "smooth"), seen_HW=placement.seen())
            tiles.append(Tile(overlay, [f"{name_of(task.network)}, {method.name}", answer], answer == truth))
    return tiles


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=Path, nargs="+", required=True)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    options = parser.parse_args()
    tasks = [load(run / "best.ckpt") for run in options.runs]
    rows = [tiles_of(path, tasks) for path in options.images]
    write_image(options.out, sheet([tile for row in rows for tile in row], columns=len(rows[0])))


if __name__ == "__main__":
    main()
