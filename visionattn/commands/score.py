"""The verb `score`: measure whether to believe a method's heatmaps."""

import argparse
from typing import Any

from visionattn.commands.options import Parser, add_model, load, method_and_layer
from visionattn.errors import UsageError

_FIGURES = """figures:
  deletion   how likely the model's answer stays while the hottest pixels go
  insertion  how likely it gets while they come back into a blurred image
  pointing   whether the hottest pixel lies in the labelled object's box
  energy     share of the heat that lies in the box
  IoU        overlap with the object's mask, or box, at the best threshold
  shuffled   likeness to the map of the same model with shuffled weights"""


def parser(verb: str) -> argparse.ArgumentParser:
    """Build the parser of `visionattn score`."""
    parser = Parser(
        prog=f"visionattn {verb}",
        description="Measure whether to believe a method's heatmaps, beside controls that do not look at the model.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_FIGURES,
    )
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="PATH",
        help="the config.yaml of a run, whose test images are scored; or images and folders of them",
    )
    add_model(parser)
    parser.add_argument(
        "--method",
        nargs="+",
        metavar="NAME[@LAYER]",
        help="as overlay's, with the layer behind it; by default all that fit but scorecam, which is slow",
    )
    parser.add_argument("--images", type=int, default=200, metavar="N", help="at most; taken evenly; %(default)s")
    parser.add_argument("--steps", type=int, default=16, metavar="N", help="of deletion and insertion; %(default)s")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="images at once; %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is drawn; %(default)s")
    parser.add_argument("--out", metavar="FILE", help="write the figures: .csv, or .json with those of every image")
    return parser


def run(arguments: list[str]) -> int:
    """Run a command line, whose first word is the verb, and return the exit code."""
    options = parser(arguments[0]).parse_args(arguments[1:])
    for flag in ("images", "steps", "batch_size"):
        if getattr(options, flag) < 1:
            raise UsageError(f"--{flag.replace('_', '-')} must be ≥ 1, got {getattr(options, flag)}")

    from visionattn.commands.scorecard import images_of_config, images_of_files, scorecard
    from visionattn.maps.selection import method_of
    from visionattn.overlays.explainer import detects

    model, preprocess, _ = load(options)
    if detects(model):
        raise UsageError(
            "score measures heatmaps of whole images; for a detector's boxes see visionattn.evaluation.box_scores"
        )
    methods = None
    if options.method:
        methods = {name: method_of(*method_and_layer(name), model) for name in options.method}
    some: Any = {"count": options.images, "batch_size": options.batch_size}
    if len(options.data) == 1 and options.data[0].endswith((".yaml", ".yml")):
        images = images_of_config(options.data[0], preprocess, **some)
    else:
        images = images_of_files(options.data, preprocess, **some)
    scores = scorecard(
        model, images, methods, steps=options.steps, batch_size=options.batch_size, seed=options.seed, out=options.out
    )
    return int(bool(scores.failed or images.failures))
