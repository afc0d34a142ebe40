"""The verb `overlay`: draw heatmaps of a model over images."""

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from visionattn.commands.demo import FOLDER, demo_model, write_photographs
from visionattn.commands.explore import write_page
from visionattn.commands.options import Parser, add_model, load, method_and_layer
from visionattn.errors import UsageError

if TYPE_CHECKING:
    from visionattn.drawing import Style
    from visionattn.overlays import Explainer, Processes


def parser(verb: str) -> argparse.ArgumentParser:
    """Build the parser of `visionattn overlay`."""
    from visionattn.overlays import OUTPUTS, TARGETS

    kinds, targets = _table({name: kind.help for name, kind in OUTPUTS.items()}), _table(TARGETS)
    parser = Parser(
        prog=f"visionattn {verb}",
        description="Draw heatmaps of a model over images.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"kinds to save:\n{kinds}\n\ntargets:\n{targets}",
    )
    parser.add_argument(
        "--demo",
        action=_Demo,
        help="draw overlays of four photographs that are installed, with EfficientNet-Lite0; needs no --images and no "
        f"model, and writes into {FOLDER}/ unless --out is given (default: off)",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        required=True,
        metavar="PATH",
        help="images, videos, folders, quoted patterns ('in/**/*.jpg') and lists (.csv, .jsonl) (required)",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder for the outputs and manifest.jsonl (required)"
    )
    add_model(parser, compare=True)
    parser.add_argument(
        "--method",
        nargs="+",
        metavar="NAME[@LAYER]",
        help="heatmap methods; several are drawn side by side (default: one that fits the model)",
    )
    parser.add_argument(
        "--layer",
        nargs="+",
        metavar="LAYER",
        help="modules whose attention or features to show (default: the last that fits the method)",
    )
    parser.add_argument(
        "--target",
        metavar="TARGET",
        help="output to explain: number or name of a class, or another form, see below (default: the most probable "
        "class of each image)",
    )
    parser.add_argument(
        "--save", nargs="+", metavar="KIND", default=["overlay"], help="kinds of output, see below (default: overlay)"
    )
    style = parser.add_argument_group("style")
    style.add_argument(
        "--colormap",
        metavar="NAME",
        help="colours: inferno, magma, plasma, viridis, cividis, turbo or bone (default: inferno)",
    )
    style.add_argument(
        "--alpha", type=float, metavar="FLOAT", help="opacity of the hottest pixel, 0 to 1 (default: 0.75)"
    )
    style.add_argument(
        "--contours",
        nargs="+",
        type=float,
        metavar="FLOAT",
        help="levels of heat, 0 to 1, at which to draw lines (default: no lines)",
    )
    style.add_argument(
        "--top", type=float, metavar="FLOAT", help="per cent of pixels that mask and spotlight keep (default: 20)"
    )
    style.add_argument(
        "--interpolation",
        choices=("nearest", "linear", "smooth"),
        help="how heat is drawn between the cells of a heatmap; nearest shows the cells (default: smooth)",
    )
    style.add_argument("--caption", action="store_true", help="write the prediction into overlays (default: off)")
    style.add_argument(
        "--format", choices=("jpg", "png", "webp"), default="jpg", help="format of the pictures (default: %(default)s)"
    )
    parser.add_argument(
        "--page",
        action="store_true",
        help="also write DIR/index.html, a page to explore 20 of the images; see visionattn explore (default: off)",
    )
    parser.add_argument(
        "--fps", type=float, metavar="FLOAT", help="frames per second to sample from videos (default: every frame)"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="INT",
        help="images per forward pass (default: 16 of 224 × 224 pixels, fewer of larger inputs)",
    )
    parser.add_argument(
        "--max-pixels", type=int, metavar="INT", help="refuse images with more pixels (default: 178 million)"
    )
    parser.add_argument(
        "--devices",
        type=int,
        default=1,
        metavar="INT",
        help="processes that share the work, each on its own GPU or its part of the cores (default: %(default)s)",
    )
    parser.add_argument(
        "--strategy", choices=("ddp",), default="ddp", help="how processes share the work (default: %(default)s)"
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="number format of the model's computation (default: %(default)s)",
    )
    return parser


def _table(rows: Mapping[str, str]) -> str:
    width = max(map(len, rows)) + 2
    return "\n".join(f"  {name:<{width}}{text}" for name, text in rows.items())


def run(arguments: list[str]) -> int:
    """Write the overlays and return the exit code: 1 if some images failed, else 0.

    Args:
        arguments: the command line after `visionattn`; its first word is the verb.

    Raises:
        UsageError: a flag is wrong, or as for `overlays.export`.
        DataError: as for `overlays.export`.
    """
    options = parser(arguments[0]).parse_args(arguments[1:])
    if options.demo:
        _prepare_demo(options)
    if options.devices < 1:
        raise UsageError(f"--devices must be ≥ 1, got {options.devices}")
    if options.page and options.compare:
        raise UsageError("--page shows one model, and --compare names two; give --ckpt instead")

    from visionattn.data import MAX_PIXELS
    from visionattn.explorer import refuse_foreign_file
    from visionattn.maps import MaxOverBoxes, Method, default_note
    from visionattn.overlays import export

    page = os.path.join(options.out, "index.html") if options.page else ""
    if page:
        refuse_foreign_file(page)
    with _processes(options.devices, arguments) as processes:
        explainers = _explainers(options)
        if options.demo:
            # the first process finds the images, so the others need none
            first = processes is None or processes.rank == 0
            options.images = write_photographs(os.path.join(options.out, "photographs")) if first else []
        summary = export(
            options.images,
            options.out,
            explainers,
            save=options.save,
            compare=options.compare is not None,
            target=options.target,
            batch_size=options.batch_size,
            style=_style(options),
            fps=options.fps,
            bf16=options.precision == "bf16",
            max_pixels=options.max_pixels or MAX_PIXELS,
            processes=processes,
        )
    note = "" if options.method or options.layer else default_note(getattr(explainers[0].method, "name", ""))
    if summary.written and note and (processes is None or processes.rank == 0):
        print(f"  {note}")
    if page and summary.images and (processes is None or processes.rank == 0):
        if summary.written or not os.path.exists(page):
            methods = {
                explainer.name or explainer.method.name: explainer.method
                for explainer in explainers
                if isinstance(explainer.method, (Method, MaxOverBoxes))
            }
            write_page(page, explainers[0], methods, summary.images)
        else:  # nothing has changed since the page was written
            print(f"  {page}   as before")
    return summary.exit_code


class _Demo(argparse.Action):
    """The flag `--demo`: the options that name images, outputs and the model are then no longer required."""

    def __init__(self, **options: Any) -> None:  # the arguments of argparse.Action
        super().__init__(nargs=0, default=False, **options)

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *others: object) -> None:
        namespace.demo = True
        for action in parser._actions:
            action.required = False
        for group in parser._mutually_exclusive_groups:
            group.required = False


def _prepare_demo(options: argparse.Namespace) -> None:
    """Check the options of a demo and set its defaults.

    Raises:
        UsageError: an option names other images or another model.
    """
    own = ("images", "ckpt", "model", "compare", "weights", "new_head", "size", "mean", "std", "classes", "trust")
    if given := [name for name in own if getattr(options, name)]:
        flag = given[0].replace("_", "-")
        raise UsageError(f"--demo has its own photographs and network; leave out --{flag}, or --demo")
    options.out = options.out or FOLDER
    options.caption = True


def _style(options: argparse.Namespace) -> "Style":
    """Return the style that the options describe, with the defaults of `Style` for the others."""
    from visionattn.drawing import Style

    changes = {
        "colormap": options.colormap,
        "alpha": options.alpha,
        "contours": options.contours and tuple(options.contours),
        "top": None if options.top is None else options.top / 100,
        "caption": options.caption,
        "interpolation": options.interpolation,
        "suffix": f".{options.format}",
    }
    return dataclasses.replace(Style(), **{name: value for name, value in changes.items() if value is not None})


def _processes(devices: int, arguments: list[str]) -> "contextlib.AbstractContextManager[Processes | None]":
    """Start or join the processes that share the work. The context yields None if this process works alone."""
    if devices == 1 and not {"WORLD_SIZE", "SLURM_PROCID"} & os.environ.keys():  # variables of torchrun and srun
        return contextlib.nullcontext()
    from visionattn.overlays import gather

    return gather(devices, arguments)


def _explainers(options: argparse.Namespace) -> "list[Explainer]":
    """Return an explainer for each model and method that the options name.

    Raises:
        UsageError: there is no such model, method or layer, or options contradict each other.
        DataError: a checkpoint cannot be used.
    """
    from visionattn.overlays import Explainer, find_method, grey_image

    if options.compare:
        if len(options.method or ()) > 1 or len(options.layer or ()) > 1:
            raise UsageError("--compare takes one method and one layer; name at most one of each")
        names = _distinct_names(options.compare)
        models = [load(argparse.Namespace(**{**vars(options), "ckpt": path})) for path in options.compare]
    else:
        names, models = [""], [demo_model() if options.demo else load(options)]
    methods = [method_and_layer(method) for method in options.method or [None]]
    if options.layer and any(layer for _, layer in methods):
        raise UsageError("a layer is named by --layer or as METHOD@LAYER, not both")
    if options.layer:
        methods = [(method, layer) for method, _ in methods for layer in options.layer]
    explainers = []
    for name, path, (model, preprocess, class_names) in zip(
        names, options.compare or [options.model or options.ckpt or "tf_efficientnet_lite0"], models, strict=True
    ):
        image = grey_image(model, preprocess)
        for method, layer in methods:
            method_name = "@".join(part for part in (method, layer) if part) if len(methods) > 1 else ""
            explainers.append(
                Explainer(
                    model,
                    preprocess,
                    find_method(method, layer, model, image),
                    tuple(class_names),
                    path,
                    name or method_name,
                )
            )
    return explainers


def _distinct_names(paths: Sequence[str]) -> list[str]:
    """Return the shortest distinct names of some files: the parts of their paths that differ.

    Raises:
        UsageError: two paths are the same file.
    """
    parts = [os.path.splitext(os.path.abspath(path))[0].split(os.sep) for path in paths]
    if len(set(map(tuple, parts))) < len(parts):
        raise UsageError(f"{paths[0]} is compared with itself; name two different checkpoints")
    if len({names[-1] for names in parts}) == len(parts):
        return [names[-1] for names in parts]
    while len({names[0] for names in parts}) == 1:
        parts = [names[1:] for names in parts]
    while len({names[-1] for names in parts}) == 1:
        parts = [names[:-1] for names in parts]
    return ["/".join(names) for names in parts]
