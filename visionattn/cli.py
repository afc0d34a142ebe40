"""The command line: `visionattn VERB …`. What a verb needs is imported when it is called."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from visionattn.errors import DataError, UsageError, nearest

if TYPE_CHECKING:
    from typing import NoReturn

    from torch import nn

    from visionattn.data import Preprocess
    from visionattn.maps import Method

_RANDOM = "random"  # in place of a weights file
_LIGHTNING_VERBS = {
    "fit": "train from a YAML config",
    "validate": "score a checkpoint on the validation images",
    "test": "score a checkpoint on the test images and write a report with overlays",
    "predict": "write the classes of images with their probabilities",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code: 0, 1 for data that cannot be used, 2 for a wrong call, 130 for Ctrl-C."""
    # OpenMP's threads wait for each other by spinning for milliseconds. Where others share the cores that made a step
    # of the quickstart 6 times as long (214 ms for 34), and nothing faster elsewhere. Read when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    try:
        return _run(arguments)
    except (UsageError, DataError) as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130


def _run(arguments: list[str]) -> int:
    verbs = {**dict.fromkeys(_LIGHTNING_VERBS, _lightning), **{name: verb for name, (verb, _) in _OWN_VERBS.items()}}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"visionattn {version('visionattn')}")
        return 0
    if arguments[0] not in verbs:
        raise UsageError(
            f"visionattn has no verb {arguments[0]!r}.{nearest(arguments[0], verbs)} See visionattn --help."
        )
    return verbs[arguments[0]](arguments)


def _help() -> str:
    verbs = {**_LIGHTNING_VERBS, **{name: text for name, (_, text) in _OWN_VERBS.items()}}
    width = max(map(len, verbs))
    return "\n".join(
        [
            "usage: visionattn VERB [OPTIONS]",
            "",
            "Train vision models that attend, see where they looked, and measure whether to believe it.",
            "",
            *(f"  {name:<{width}}  {text}" for name, text in verbs.items()),
            "",
            "  visionattn VERB --help     the options of a verb",
            "  visionattn --version",
            "  --debug                    with any verb: show where an error arose",
            "",
            "First steps: visionattn fit --config configs/quickstart.yaml",
        ]
    )


def _lightning(arguments: list[str]) -> int:
    from visionattn.training.command import run

    run(arguments[0], arguments[1:])
    return 0


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ours: one sentence, the nearest right name."""

    def error(self, message: str) -> "NoReturn":
        if message.startswith("unrecognized arguments: "):
            flag = message.removeprefix("unrecognized arguments: ").split()[0]
            message = f"{self.prog} has no option {flag}.{nearest(flag, self._option_string_actions)}"
        raise UsageError(message)


def _overlay(arguments: list[str]) -> int:
    parser = _Parser(prog="visionattn overlay", description="Write overlays of where a model looked in images.")
    parser.add_argument(
        "--images", nargs="+", required=True, metavar="FILE_OR_FOLDER", help="images, or folders of them"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the overlays and the manifest")
    _add_model(parser)
    parser.add_argument("--method", metavar="NAME", help="how attention becomes a heatmap; by default what fits")
    parser.add_argument("--layer", metavar="NAME", help="where in the model to look; the last place that fits")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="images at once; %(default)s")
    parser.add_argument("--max-pixels", type=int, metavar="N", help="refuse larger images")
    options = parser.parse_args(arguments[1:])

    from visionattn.data.decode import MAX_PIXELS
    from visionattn.overlay.export import export

    model, preprocess, class_names = _load(options)
    summary = export(
        options.images,
        options.out,
        model=model,
        preprocess=preprocess,
        method=_method(options.method, options.layer, model),
        batch_size=options.batch_size,
        class_names=class_names,
        model_name=options.model or options.ckpt,
        max_pixels=options.max_pixels or MAX_PIXELS,
    )
    return summary.exit_code


def _score(arguments: list[str]) -> int:
    parser = _Parser(
        prog="visionattn score",
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
    _add_model(parser)
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
    options = parser.parse_args(arguments[1:])
    for flag in ("images", "steps", "batch_size"):
        if getattr(options, flag) < 1:
            raise UsageError(f"--{flag.replace('_', '-')} must be ≥ 1, got {getattr(options, flag)}")

    from visionattn.scorecard import images_of_config, images_of_files, scorecard

    model, preprocess, _ = _load(options)
    methods = None
    if options.method:
        methods = {name: _method(*_split(name), model) for name in options.method}
    some: Any = {"count": options.images, "batch_size": options.batch_size}
    if len(options.data) == 1 and options.data[0].endswith((".yaml", ".yml")):
        images = images_of_config(options.data[0], preprocess, **some)
    else:
        images = images_of_files(options.data, preprocess, **some)
    scores = scorecard(
        model,
        images,
        methods,
        steps=options.steps,
        batch_size=options.batch_size,
        seed=options.seed,
        out=options.out,
    )
    return int(bool(scores.failed or images.failures))


def _data(arguments: list[str]) -> int:
    parser = _Parser(prog="visionattn data", description="Look at a folder of annotated images.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    check_parser = verbs.add_parser("check", help="list all that is wrong with the annotations of a data set")
    check_parser.add_argument("path", metavar="PATH", help="a folder in COCO's, Pascal VOC's or YOLO's layout")
    check_parser.add_argument("--images", metavar="DIR", help="the images, where they are in none of the usual places")
    check_parser.add_argument("--box-format", choices=("xyxy", "xywh", "cxcywh"), help="of the numbers in the files")
    check_parser.add_argument("--limit", type=int, metavar="N", help="list at most so many problems of a kind")
    options = parser.parse_args(arguments[1:])

    from visionattn.data.checking import check

    report = check(options.path, images=options.images, box_format=options.box_format)
    print("\n".join(report.lines(options.limit)))
    return int(bool(report.problems))


_FIGURES = """figures:
  deletion   how likely the model's answer stays while the hottest pixels go
  insertion  how likely it gets while they come back into a blurred image
  pointing   whether the hottest pixel lies in the labelled object's box
  energy     share of the heat that lies in the box
  IoU        overlap with the object's mask, or box, at the best threshold
  shuffled   likeness to the map of the same model with shuffled weights"""


def _split(name: str) -> tuple[str, str | None]:
    """NAME[@LAYER]"""
    method, _, layer = name.partition("@")
    return method, layer or None


def _add_model(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ckpt", metavar="FILE", help="a checkpoint that visionattn fit wrote")
    source.add_argument("--model", metavar="TIMM_NAME", help="a timm model")
    parser.add_argument(
        "--weights", metavar="FILE", help=f"weights for --model; those of the hub by default; {_RANDOM!r} for none"
    )


def _load(options: argparse.Namespace) -> "tuple[nn.Module, Preprocess, Sequence[str]]":
    """The network that the options name, what its images need, and the names of its outputs."""
    if options.weights and not options.model:
        raise UsageError("--weights goes with --model; a checkpoint brings its own")
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.ckpt:
        from visionattn.training.checkpoints import load

        task: Any = load(options.ckpt)
        if task.preprocess is None:
            raise DataError(f"{options.ckpt} does not say how its images are prepared")
        return task.network.to(device), task.preprocess, task.class_names
    from visionattn.models.backbone import class_names_of, create_backbone, preprocess_of

    random = options.weights == _RANDOM
    torch.manual_seed(0)  # the same random weights every time, so that a run can be taken up again
    model = create_backbone(
        options.model, pretrained=not options.weights, weights=None if random else options.weights
    ).eval()
    return model.to(device), preprocess_of(model), () if random else class_names_of(model)


def _method(name: str | None, layer: str | None, model: "nn.Module") -> "Method":
    """The method of a name; layers are names of modules, or their place in the order."""
    import inspect
    import re

    from visionattn.maps.choose import METHODS, default_method

    if name is not None and name not in METHODS:
        raise UsageError(f"there is no method {name!r}.{nearest(name, METHODS)} All: {', '.join(METHODS)}.")
    if name is None and layer is None:
        return default_method(model)
    kind = METHODS[name] if name else type(default_method(model))
    if layer is None:
        return kind()
    if "layer" not in inspect.signature(kind).parameters:
        raise UsageError(f"{kind.name} combines all layers and takes no layer")
    by_place = "int" in str(inspect.signature(kind).parameters["layer"].annotation)
    place: Any = int(layer) if by_place and re.fullmatch(r"-?\d+", layer) else layer
    return kind(layer=place)  # type: ignore[call-arg]


_OWN_VERBS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "data": (_data, "check a data set: visionattn data check PATH"),
    "overlay": (_overlay, "write overlays of where a model looked in images"),
    "score": (_score, "measure whether to believe a method's heatmaps"),
}

if __name__ == "__main__":
    sys.exit(main())
