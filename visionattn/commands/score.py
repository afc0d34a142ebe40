"""The verb `score`: measure whether a method's heatmaps can be trusted."""

import argparse

from visionattn.commands.options import Parser, add_model, load, method_and_layer
from visionattn.errors import UsageError

_FIGURES = """metrics:
  deletion   mean probability of the model's answer while the hottest pixels are removed; low is good
  insertion  mean probability of the answer while the hottest pixels return to a blurred image; high is good
  pointing   how often the hottest pixel lies in the labelled object's box; high is good
  energy     fraction of the heat inside the box; high is good
  IoU        overlap with the object's mask, or box, at the best threshold; high is good
  shuffled   similarity to the map of the same model with shuffled weights; low is good
  road       probability without the coldest pixels, minus that without the hottest, filled in smoothly; high is good
  saco       whether hotter pixels have more influence on the answer, from -1 to 1; high is good
  grid       fraction of the heat on the explained image in a grid of four images; high is good"""


def parser(verb: str) -> argparse.ArgumentParser:
    """Build the parser of `visionattn score`."""
    parser = Parser(
        prog=f"visionattn {verb}",
        description="Measure whether a method's heatmaps can be trusted: score them, and compare them with controls "
        "that do not depend on the model.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_FIGURES,
    )
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="PATH",
        help="config.yaml of a run, to score its test images; or images and folders of images (required)",
    )
    add_model(parser)
    parser.add_argument(
        "--method",
        nargs="+",
        metavar="NAME[@LAYER]",
        help="heatmap methods to score (default: every fast method that fits the model)",
    )
    parser.add_argument(
        "--maps",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FOLDER",
        help="folders of heatmaps that another program made, each a method of this name; photo.jpg has photo.npy, "
        "photo.npz or a grey photo.png (default: none)",
    )
    parser.add_argument(
        "--maps-span",
        choices=("picture", "input"),
        help="what the heatmaps of --maps span: the source picture, or the model's input (default: the picture if "
        "their sides have its ratio, else the input)",
    )
    parser.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help="metrics to measure, see below (default: all that the data allows, except road, saco and grid)",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=200,
        metavar="INT",
        help="largest number of images to score, chosen at equal intervals (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=16,
        metavar="INT",
        help="steps of the deletion and insertion curves (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="INT", help="images per forward pass (default: %(default)s)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="INT",
        help="seed of the random controls, shuffled weights and resamples (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="file for the figures: .csv, or .json, which adds the figures of every image (default: no file)",
    )
    return parser


def run(arguments: list[str]) -> int:
    """Score the methods, print the table and return the exit code: 1 if a method or an image failed, else 0.

    Args:
        arguments: the command line after `visionattn`; its first word is the verb.

    Raises:
        UsageError: a flag is wrong, or the model is a detector.
        DataError: there are no images, the checkpoint cannot be used, or the figures cannot be written.
    """
    options = parser(arguments[0]).parse_args(arguments[1:])
    for flag in ("images", "steps", "batch_size"):
        if getattr(options, flag) < 1:
            raise UsageError(f"--{flag.replace('_', '-')} must be ≥ 1, got {getattr(options, flag)}")

    from visionattn.commands.scorecard import images_of_config, images_of_files, scorecard
    from visionattn.evaluation import FolderMaps, check_metrics, folders_of
    from visionattn.maps import Method, make_method, methods_that_fit
    from visionattn.overlays import grey_image, is_detector

    metrics = check_metrics([name.lower() for name in options.metrics] if options.metrics else None)
    folders = folders_of(options.maps, options.method or [], frame=options.maps_span)
    model, preprocess, class_names = load(options)
    if is_detector(model):
        raise UsageError(
            "this model is a detector, and score needs heatmaps of whole images; use visionattn.evaluation.box_scores"
        )
    methods: dict[str, Method | FolderMaps] | None = None
    if options.method or folders:
        image = grey_image(model, preprocess)
        named = {name: make_method(*method_and_layer(name), model, image) for name in options.method or ()}
        methods = {**(named or methods_that_fit(model, image)), **folders}
    if len(options.data) == 1 and options.data[0].endswith((".yaml", ".yml")):
        images = images_of_config(
            options.data[0],
            preprocess,
            class_names if options.ckpt or options.classes else (),  # a pretrained model's names are not the data's
            count=options.images,
            batch_size=options.batch_size,
        )
    else:
        images = images_of_files(options.data, preprocess, count=options.images, batch_size=options.batch_size)
    scores = scorecard(
        model,
        images,
        methods,
        metrics=metrics,
        steps=options.steps,
        batch_size=options.batch_size,
        seed=options.seed,
        out=options.out,
    )
    return int(bool(scores.failed or images.failures))
