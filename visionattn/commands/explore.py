"""The verb `explore`: write an HTML page to explore a model's attention and heatmaps."""

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from visionattn.commands.options import Parser, add_model, load, method_and_layer
from visionattn.errors import UsageError

if TYPE_CHECKING:
    from visionattn.maps import BoxMethod, MaxOverBoxes, Method
    from visionattn.overlays import Explainer


def parser(verb: str) -> argparse.ArgumentParser:
    """Build the parser of `visionattn explore`."""
    parser = Parser(
        prog=f"visionattn {verb}",
        description="Write a page to explore a model's attention and heatmaps: one HTML file that needs no network.",
    )
    parser.add_argument(
        "--images", nargs="+", required=True, metavar="PATH", help="images, or folders of images (required)"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the page to write, .html (required)")
    add_model(parser)
    parser.add_argument(
        "--method",
        nargs="+",
        metavar="NAME[@LAYER]",
        help="heatmap methods to show and to compare with the controls "
        "(default: every fast method that fits the model)",
    )
    parser.add_argument(
        "--count",
        type=int,
        default=20,
        metavar="INT",
        help="largest number of images on the page, chosen at equal intervals (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=8,
        metavar="INT",
        help="steps of the deletion and insertion curves; 0 leaves the curves out (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=32,
        metavar="INT",
        help="perturbed images per forward pass (default: %(default)s)",
    )
    parser.add_argument(
        "--max-mb",
        type=float,
        default=15,
        metavar="FLOAT",
        help="largest size of the page in MB; weights are rounded until the page fits (default: %(default)s)",
    )
    return parser


def run(arguments: list[str]) -> int:
    """Write the page and return the exit code: 1 if some images cannot be read, else 0.

    Args:
        arguments: the command line after `visionattn`; its first word is the verb.

    Raises:
        UsageError: a flag is wrong, a method does not fit the model, or `--out` is an existing file of another kind.
        DataError: there are no images, the checkpoint cannot be used, or the page cannot be written.
    """
    options = parser(arguments[0]).parse_args(arguments[1:])
    if options.count < 1 or options.steps < 0 or options.steps == 1:
        raise UsageError(f"--count must be ≥ 1 and --steps 0 or ≥ 2, got {options.count} and {options.steps}")

    from visionattn.data import find
    from visionattn.explorer import refuse_foreign_file
    from visionattn.overlays import Explainer, find_method, grey_image

    refuse_foreign_file(options.out)
    images = find(options.images, out=os.devnull).images
    model, preprocess, class_names = load(options)
    image = grey_image(model, preprocess)
    methods = {name: find_method(*method_and_layer(name), model, image) for name in options.method or ()} or None
    failures = write_page(
        options.out,
        Explainer(model, preprocess, None, tuple(class_names), options.model or options.ckpt),
        methods,
        images,
        count=options.count,
        steps=options.steps,
        batch_size=options.batch_size,
        limit=round(1e6 * options.max_mb),
    )
    return int(bool(failures))


def write_page(
    path: str,
    explainer: "Explainer",
    methods: "Mapping[str, Method | BoxMethod | MaxOverBoxes] | None",
    images: Sequence[str],
    *,
    count: int = 20,
    steps: int = 8,
    batch_size: int = 32,
    limit: int = 15_000_000,
) -> Sequence[tuple[str, str]]:
    """Write a page of some images, and print its path, size and failures.

    Args:
        path: path of the page to write.
        explainer: the model, its preprocessing and its class names.
        methods: name on the page → method; None for every fast method that fits the model, see `maps.methods_that_fit`.
        images: paths of the images.
        count: largest number of images on the page, chosen at equal intervals.
        steps, batch_size, limit: see `explorer.explore`; the limit is in bytes.

    Returns:
        (image, reason) of each image that cannot be read.
    """
    from rich.console import Console

    from visionattn.commands.scorecard import evenly
    from visionattn.explorer import explore, tell

    console = Console()
    page = explore(
        explainer.model,
        [images[index] for index in evenly(len(images), count)],
        preprocess=explainer.preprocess,
        methods=methods,
        class_names=explainer.class_names,
        model_name=explainer.model_name,
        steps=steps,
        batch_size=batch_size,
        limit=limit,
        console=console,
    )
    page.save(path)
    tell(page, path, total=len(images), console=console)
    return page.failures
