"""The verb `overlay`: write overlays of where a model looked."""

import argparse
import contextlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from visionattn.commands.explore import write_page
from visionattn.commands.options import Parser, add_model, load, load_checkpoint, method_and_layer
from visionattn.errors import UsageError

if TYPE_CHECKING:
    from visionattn.overlays.explainer import View
    from visionattn.overlays.folder.processes import Team

_SAVED = """kinds to save:
  overlay     the heatmap over the picture, at its size; several methods or layers in one sheet
  contour     lines of equal heat on the picture
  spotlight   the hottest pixels as they are, the others dark
  side        picture, overlay and heatmap beside each other, with a colour bar
  difference  with --compare: where the second model looks more (orange) or less (blue)
  heatmap     16-bit PNG of the picture's size
  mask        PNG, 255 where the hottest pixels are
  gaze        of a network that takes glimpses: their path, numbered, and every scale's box
  animation   of a GlimpseNetwork: .webp, glimpse after glimpse what it has seen and believes
  boxes       of a detector: each box that it found with its own heat, in a sheet
  array       .npz: the heatmap as the model has it, and where it lies in the picture"""


def parser(verb: str) -> argparse.ArgumentParser:
    """Build the parser of `visionattn overlay`."""
    parser = Parser(
        prog=f"visionattn {verb}",
        description="Write overlays of where a model looked in images.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_SAVED,
    )
    parser.add_argument(
        "--images",
        nargs="+",
        required=True,
        metavar="PATH",
        help="images, videos, folders, quoted patterns ('in/**/*.jpg'), lists (.csv, .jsonl)",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the outputs and the manifest")
    add_model(parser).add_argument(
        "--compare", nargs=2, metavar="CKPT", help="two checkpoints, to see where the second looks differently"
    )
    parser.add_argument(
        "--method", nargs="+", metavar="NAME[@LAYER]", help="how attention becomes a heatmap; by default what fits"
    )
    parser.add_argument("--layer", nargs="+", metavar="NAME", help="where in the model to look; the last that fits")
    parser.add_argument("--target", metavar="CLASS", help="number or name of what to explain; what the model sees")
    parser.add_argument("--save", nargs="+", metavar="KIND", default=["overlay"], help="see below; overlay")
    look = parser.add_argument_group("looks")
    look.add_argument("--colormap", metavar="NAME", help="inferno; any of magma, plasma, viridis, cividis, turbo, bone")
    look.add_argument("--alpha", type=float, metavar="A", help="opacity of the hottest place, 0 to 1; 0.75")
    look.add_argument("--contours", nargs="+", type=float, metavar="LEVEL", help="draw lines at these heats, 0 to 1")
    look.add_argument("--top", type=float, metavar="PERCENT", help="hottest pixels of mask and spotlight; 20")
    look.add_argument("--caption", action="store_true", help="write the prediction into overlays")
    look.add_argument("--format", choices=("jpg", "png", "webp"), default="jpg", help="of pictures; %(default)s")
    parser.add_argument(
        "--page", action="store_true", help="write DIR/index.html too, to explore 20 of the images, as explore does"
    )
    parser.add_argument("--fps", type=float, metavar="N", help="frames a second to take of a video; all")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images at once; by the size of the model's input")
    parser.add_argument("--max-pixels", type=int, metavar="N", help="refuse larger images")
    parser.add_argument(
        "--devices", type=int, default=1, metavar="N", help="processes that share the work; %(default)s"
    )
    parser.add_argument("--strategy", choices=("ddp",), default="ddp", help="how they share it; %(default)s")
    parser.add_argument("--compile", action="store_true", help="compile what is not watched; the first batch is slow")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the model; %(default)s")
    return parser


def run(arguments: list[str]) -> int:
    """Run a command line, whose first word is the verb, and return the exit code."""
    options = parser(arguments[0]).parse_args(arguments[1:])
    if options.devices < 1:
        raise UsageError(f"--devices must be ≥ 1, got {options.devices}")
    if options.page and options.compare:
        raise UsageError("--page shows one model, and --compare has two; take --ckpt")

    from visionattn.data.decode import MAX_PIXELS
    from visionattn.drawing.rendering import Style
    from visionattn.explorer.explorer import refuse_stranger
    from visionattn.overlays.folder.export import export

    page = os.path.join(options.out, "index.html") if options.page else ""
    if page:
        refuse_stranger(page)
    given: dict[str, Any] = {
        "colormap": options.colormap,
        "alpha": options.alpha,
        "contours": options.contours and tuple(options.contours),
        "top": None if options.top is None else options.top / 100,
        "caption": options.caption,
        "suffix": f".{options.format}",
    }
    style = Style(**{name: value for name, value in given.items() if value is not None})
    target = options.target
    with _processes(options.devices, arguments) as team:
        views = _views(options)
        summary = export(
            options.images,
            options.out,
            views,
            save=options.save,
            compare=options.compare is not None,
            target=int(target) if target is not None and target.isdecimal() else target,
            batch_size=options.batch_size,
            style=style,
            fps=options.fps,
            bf16=options.precision == "bf16",
            compile=options.compile,
            max_pixels=options.max_pixels or MAX_PIXELS,
            team=team,
        )
    if page and summary.images and (team is None or team.rank == 0):
        anew = summary.written or not os.path.exists(page)  # a run that is repeated changes nothing
        methods = {view.name or getattr(view.method, "name", ""): view.method for view in views}
        write_page(page, views[0], methods, summary.images) if anew else print(f"  {page}   as before")
    return summary.exit_code


def _processes(devices: int, arguments: list[str]) -> "contextlib.AbstractContextManager[Team | None]":
    """The processes that share the work; None where this one does it alone."""
    if devices == 1 and "WORLD_SIZE" not in os.environ:
        return contextlib.nullcontext()
    from visionattn.overlays.folder.processes import gather

    return gather(devices, arguments)


def _views(options: argparse.Namespace) -> "list[View]":
    """The models that `overlay` is asked to show, each with its methods."""
    from visionattn.overlays.explainer import View, method_for

    if options.compare:
        if len(options.method or ()) > 1 or len(options.layer or ()) > 1:
            raise UsageError("--compare shows two models by one method and layer")
        names = _telling(options.compare)
        models = [load_checkpoint(path) for path in options.compare]
    else:
        names, models = [""], [load(options)]
    methods = [method_and_layer(method) for method in options.method or [None]]
    if options.layer and any(layer for _, layer in methods):
        raise UsageError("a layer is given by --layer or behind the method's name, not both")
    if options.layer:
        methods = [(method, layer) for method, _ in methods for layer in options.layer]
    views = []
    for name, path, (model, preprocess, class_names) in zip(
        names, options.compare or [options.model or options.ckpt], models, strict=True
    ):
        for method, layer in methods:
            view_name = "@".join(part for part in (method, layer) if part) if len(methods) > 1 else ""
            views.append(
                View(model, preprocess, method_for(method, layer, model), tuple(class_names), path, name or view_name)
            )
    return views


def _telling(paths: Sequence[str]) -> list[str]:
    """The shortest names that tell some files apart: the parts of their paths that differ."""
    parts = [os.path.splitext(os.path.abspath(path))[0].split(os.sep) for path in paths]
    if len(set(map(tuple, parts))) < len(parts):
        raise UsageError(f"{paths[0]} is compared with itself; name two checkpoints")
    if len({names[-1] for names in parts}) == len(parts):
        return [names[-1] for names in parts]
    while len({names[0] for names in parts}) == 1:
        parts = [names[1:] for names in parts]
    while len({names[-1] for names in parts}) == 1:
        parts = [names[:-1] for names in parts]
    return ["/".join(names) for names in parts]
