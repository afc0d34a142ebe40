"""The verb `explore`: make a page to explore where a model looks."""

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from visionattn.commands.options import Parser, add_model, load, method_and_layer
from visionattn.errors import UsageError

if TYPE_CHECKING:
    from visionattn.overlays.explainer import View


def parser(verb: str) -> argparse.ArgumentParser:
    """Build the parser of `visionattn explore`."""
    parser = Parser(
        prog=f"visionattn {verb}",
        description="Make one page to explore where a model looks: a single HTML file, which needs no network.",
    )
    parser.add_argument(
        "--images", nargs="+", required=True, metavar="FILE_OR_FOLDER", help="images, or folders of them"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the page, .html")
    add_model(parser)
    parser.add_argument(
        "--method",
        nargs="+",
        metavar="NAME[@LAYER]",
        help="whose heatmaps to show and to hold against controls; by default all that fit but scorecam, which is slow",
    )
    parser.add_argument("--count", type=int, default=20, metavar="N", help="images at most; taken evenly; %(default)s")
    parser.add_argument(
        "--steps", type=int, default=8, metavar="N", help="of deletion and insertion, 0 for none; %(default)s"
    )
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="changed images at once; %(default)s")
    parser.add_argument(
        "--max-mb",
        type=float,
        default=15,
        metavar="N",
        help="size of the page; numbers are rounded to fit; %(default)s",
    )
    return parser


def run(arguments: list[str]) -> int:
    """Run a command line, whose first word is the verb, and return the exit code."""
    options = parser(arguments[0]).parse_args(arguments[1:])
    if options.count < 1 or options.steps < 0 or options.steps == 1:
        raise UsageError(f"--count must be ≥ 1 and --steps 0 or ≥ 2, got {options.count} and {options.steps}")

    from visionattn.data.image_files import find
    from visionattn.explorer.explorer import refuse_stranger
    from visionattn.overlays.explainer import View, method_for

    refuse_stranger(options.out)
    images = find(options.images, out=os.devnull).images
    model, preprocess, class_names = load(options)
    methods = {name: method_for(*method_and_layer(name), model) for name in options.method} if options.method else None
    failures = write_page(
        options.out,
        View(model, preprocess, None, tuple(class_names), options.model or options.ckpt),
        methods,
        images,
        count=options.count,
        steps=options.steps,
        batch_size=options.batch_size,
        limit=round(1e6 * options.max_mb),
    )
    return int(bool(failures))


def write_page(
    path: str, view: "View", methods: Mapping[str, Any] | None, images: Sequence[str], *, count: int = 20, **how: Any
) -> Sequence[tuple[str, str]]:
    """Write a page of some of the images and tell of it; returns those that could not be read, and why."""
    from rich.console import Console

    from visionattn.commands.scorecard import evenly
    from visionattn.explorer.explorer import explore, tell

    console = Console()
    page = explore(
        view.model,
        [images[index] for index in evenly(len(images), count)],
        preprocess=view.preprocess,
        methods=methods,
        class_names=view.class_names,
        model_name=view.model_name,
        console=console,
        **how,
    )
    page.save(path)
    tell(page, path, total=len(images), console=console)
    return page.failures
