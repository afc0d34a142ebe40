"""The command line: `visionattn VERB …`. What a verb needs is imported when it is called."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from visionattn.errors import DataError, UsageError, nearest
from visionattn.signals import Stopped, watched

if TYPE_CHECKING:
    from typing import NoReturn

    from torch import nn

    from visionattn.data import Preprocess
    from visionattn.overlay.views import View

_RANDOM = "random"  # in place of a weights file
_LIGHTNING_VERBS = {
    "fit": "train from a YAML config",
    "validate": "score a checkpoint on the validation images",
    "test": "score a checkpoint on the test images and write a report with overlays",
    "predict": "write the classes of images with their probabilities",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code: 0, 1 for data that cannot be used, 2 for a wrong call; 130 or 143 where
    Ctrl-C or SIGTERM ended it."""
    # OpenMP's threads wait for each other by spinning for milliseconds. Where others share the cores that made a step
    # of the quickstart 6 times as long (214 ms for 34), and nothing faster elsewhere. Read when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    try:
        with watched():
            return _run(arguments)
    except (UsageError, DataError) as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except Stopped as stopped:
        return int(stopped.code or 0)


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


def _verbs() -> dict[str, str]:
    """Verb → what it does."""
    return {**_LIGHTNING_VERBS, **{name: text for name, (_, text) in _OWN_VERBS.items()}}


def _help() -> str:
    verbs = _verbs()
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
    parser = _Parser(
        prog="visionattn overlay",
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
    _add_model(parser).add_argument(
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
    options = parser.parse_args(arguments[1:])
    if options.devices < 1:
        raise UsageError(f"--devices must be ≥ 1, got {options.devices}")
    if options.page and options.compare:
        raise UsageError("--page shows one model, and --compare has two; take --ckpt")

    from visionattn.data.decode import MAX_PIXELS
    from visionattn.overlay.explorer import refuse_stranger
    from visionattn.overlay.export import export
    from visionattn.overlay.render import Style
    from visionattn.overlay.team import gather

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
    with gather(options.devices, arguments) as team:
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
    if page and summary.images and team.rank == 0:
        anew = summary.written or not os.path.exists(page)  # a run that is repeated changes nothing
        methods = {view.name or getattr(view.method, "name", ""): view.method for view in views}
        _write_page(page, views[0], methods, summary.images) if anew else print(f"  {page}   as before")
    return summary.exit_code


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


def _views(options: argparse.Namespace) -> "list[View]":
    """The models that `overlay` is asked to show, each with its methods."""
    from visionattn.overlay.views import View, method_for

    if options.compare:
        if len(options.method or ()) > 1 or len(options.layer or ()) > 1:
            raise UsageError("--compare shows two models by one method and layer")
        names = _telling(options.compare)
        models = [_load_checkpoint(path) for path in options.compare]
    else:
        names, models = [""], [_load(options)]
    methods = [_split(method) for method in options.method or [None]]
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


def _telling(paths: "Sequence[str]") -> list[str]:
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


def _explore(arguments: list[str]) -> int:
    parser = _Parser(
        prog="visionattn explore",
        description="Make one page to explore where a model looks: a single HTML file, which needs no network.",
    )
    parser.add_argument(
        "--images", nargs="+", required=True, metavar="FILE_OR_FOLDER", help="images, or folders of them"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the page, .html")
    _add_model(parser)
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
    options = parser.parse_args(arguments[1:])

    if options.count < 1 or options.steps < 0 or options.steps == 1:
        raise UsageError(f"--count must be ≥ 1 and --steps 0 or ≥ 2, got {options.count} and {options.steps}")

    from visionattn.overlay.explorer import refuse_stranger
    from visionattn.overlay.inputs import find
    from visionattn.overlay.views import View, method_for

    refuse_stranger(options.out)
    images = find(options.images, out=os.devnull).images
    model, preprocess, class_names = _load(options)
    methods = {name: method_for(*_split(name), model) for name in options.method} if options.method else None
    failures = _write_page(
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


def _write_page(
    path: str,
    view: "View",
    methods: "Mapping[str, Any] | None",
    images: "Sequence[str]",
    *,
    count: int = 20,
    **how: Any,
) -> "Sequence[tuple[str, str]]":
    """Write a page of some of the images and tell of it; returns those that could not be read, and why."""
    from rich.console import Console

    from visionattn.overlay.explorer import explore, tell
    from visionattn.scorecard import evenly

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

    from visionattn.maps.choose import method_of
    from visionattn.overlay.views import detects
    from visionattn.scorecard import images_of_config, images_of_files, scorecard

    model, preprocess, _ = _load(options)
    if detects(model):
        raise UsageError(
            "score measures heatmaps of whole images; for a detector's boxes see visionattn.maps.box_scores"
        )
    methods = None
    if options.method:
        methods = {name: method_of(*_split(name), model) for name in options.method}
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
    if options.limit is not None and options.limit < 1:
        raise UsageError(f"--limit must be at least 1, got {options.limit}")

    from visionattn.data.checking import check

    report = check(options.path, images=options.images, box_format=options.box_format)
    encoding = sys.stdout.encoding or "utf-8"  # names may hold what it has no character for
    print("\n".join(report.lines(options.limit)).encode(encoding, "backslashreplace").decode(encoding))
    return int(bool(report.problems))


_FIGURES = """figures:
  deletion   how likely the model's answer stays while the hottest pixels go
  insertion  how likely it gets while they come back into a blurred image
  pointing   whether the hottest pixel lies in the labelled object's box
  energy     share of the heat that lies in the box
  IoU        overlap with the object's mask, or box, at the best threshold
  shuffled   likeness to the map of the same model with shuffled weights"""


def _export(arguments: list[str]) -> int:
    parser = _Parser(
        prog="visionattn export",
        description="Make one file of a model for others to run or to load.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_FORMATS,
    )
    _add_model(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write: .safetensors, .onnx or .pt2")
    parser.add_argument("--format", choices=tuple(_SUFFIXES), help="see below; by the ending of FILE")
    parser.add_argument("--method", metavar="NAME", help="of the heatmap in a graph: raw, rollout, gate or gradcam")
    options = parser.parse_args(arguments[1:])
    suffix = os.path.splitext(options.out)[1]
    wanted = _SUFFIXES.get(options.format, suffix)
    if wanted != suffix or suffix not in _SUFFIXES.values():
        ends = wanted if options.format else "one of " + ", ".join(_SUFFIXES.values())
        raise UsageError(f"--out must end in {ends}, by which the file is known again, got {options.out}")
    if suffix == ".safetensors":
        if options.method or not options.ckpt:
            raise UsageError("a .safetensors file holds the weights of a --ckpt, and no method")
        from visionattn.training.checkpoints import export

        export(options.ckpt, options.out)
        print(f"wrote {options.out}")
        return 0
    from visionattn.exporting import export_graph

    model, preprocess, class_names = _load(options)
    told = export_graph(model.cpu(), options.out, method=options.method, preprocess=preprocess, class_names=class_names)
    size = " × ".join(map(str, told.input_size))
    print(f"wrote {options.out}   images (B, {size}) → scores, heatmap by {told.method}")
    if told.difference is None:
        print("not compared with the model, since onnxruntime is not installed")
    else:
        print(f"differs from the model by at most {told.difference:.1g} on noise")
    return 0


def _bench(arguments: list[str]) -> int:
    parser = _Parser(
        prog="visionattn bench",
        description="Measure on this machine what mechanisms, heatmaps and overlays cost, as ratios; about a minute.",
    )
    parser.add_argument(
        "--model", default="vit_small_patch16_224", metavar="TIMM_NAME", help="with random weights; %(default)s"
    )
    parser.add_argument("--batch-size", type=int, default=2, metavar="N", help="images at once; %(default)s")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of which the median counts; %(default)s")
    options = parser.parse_args(arguments[1:])

    from visionattn.bench import bench

    bench(options.model, batch_size=options.batch_size, rounds=options.rounds)
    return 0


def _completion(arguments: list[str]) -> int:
    parser = _Parser(prog="visionattn completion", description=_COMPLETION, formatter_class=_Raw)
    parser.add_argument("shell", metavar="SHELL", help="bash, zsh or fish")
    options = parser.parse_args(arguments[1:])

    from visionattn.completion import script

    print(script(options.shell, _verbs(), main), end="")
    return 0


_Raw = argparse.RawDescriptionHelpFormatter
_COMPLETION = """Print what a shell needs to complete verbs, options and values:

  bash   visionattn completion bash > ~/.local/share/bash-completion/completions/visionattn
  zsh    visionattn completion zsh > ~/.visionattn.zsh && echo 'source ~/.visionattn.zsh' >> ~/.zshrc
  fish   visionattn completion fish > ~/.config/fish/completions/visionattn.fish"""


def _push(arguments: list[str]) -> int:
    parser = _Parser(
        prog="visionattn push",
        description="Put a model on the Hugging Face hub: safetensors, JSON, and a card with results and an overlay. "
        "Every verb takes it from there as --ckpt hf://OWNER/NAME.",
    )
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="a checkpoint that visionattn fit wrote")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="on the hub; made if there is none")
    parser.add_argument("--picture", metavar="FILE", help="whose overlay the card shows; the run's overlays/test.png")
    parser.add_argument("--public", action="store_true", help="a repository that is made here is public")
    options = parser.parse_args(arguments[1:])

    from visionattn.training.hub import push

    print(push(options.ckpt, options.repo, picture=options.picture, private=not options.public))
    return 0


_SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch_export": ".pt2"}

_FORMATS = """formats:
  safetensors    .safetensors  weights of a checkpoint without a place for code; every verb takes it as --ckpt
  onnx           .onnx         a graph: images → scores and heatmap, for any runtime of ONNX
  torch_export   .pt2          the same graph for torch.export.load"""


def _split(name: str | None) -> tuple[str | None, str | None]:
    """NAME[@LAYER]"""
    method, _, layer = (name or "").partition("@")
    return method or None, layer or None


def _add_model(parser: argparse.ArgumentParser) -> Any:
    """Returns the group of options of which one names the model."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--ckpt", metavar="FILE", help="a checkpoint that visionattn fit wrote, or hf://OWNER/NAME")
    source.add_argument("--model", metavar="TIMM_NAME", help="a timm model")
    parser.add_argument(
        "--weights", metavar="FILE", help=f"weights for --model; those of the hub by default; {_RANDOM!r} for none"
    )
    return source


def _load(options: argparse.Namespace) -> "tuple[nn.Module, Preprocess, Sequence[str]]":
    """The network that the options name, what its images need, and the names of its outputs."""
    if options.weights and not options.model:
        raise UsageError("--weights goes with --model; a checkpoint brings its own")
    if options.ckpt:
        return _load_checkpoint(options.ckpt)
    import torch

    from visionattn.models.backbone import class_names_of, create_backbone, preprocess_of

    random = options.weights == _RANDOM
    torch.manual_seed(0)  # the same random weights every time, so that a run can be taken up again
    model = create_backbone(
        options.model, pretrained=not options.weights, weights=None if random else options.weights
    ).eval()
    return model.to(_device()), preprocess_of(model), () if random else class_names_of(model)


def _load_checkpoint(path: str) -> "tuple[nn.Module, Preprocess, Sequence[str]]":
    from visionattn.training.checkpoints import load

    task: Any = load(path)
    if task.preprocess is None:
        raise DataError(f"{path} does not say how its images are prepared")
    return task.network.to(_device()), task.preprocess, task.class_names


def _device() -> str:
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % count}" if count else "cpu"


_OWN_VERBS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "data": (_data, "check a data set: visionattn data check PATH"),
    "overlay": (_overlay, "write overlays of where a model looked in images"),
    "explore": (_explore, "make a page to explore where a model looks in images"),
    "score": (_score, "measure whether to believe a method's heatmaps"),
    "bench": (_bench, "measure what attention costs on this machine"),
    "push": (_push, "put a model on the Hugging Face hub"),
    "completion": (_completion, "print what a shell needs to complete verbs and options"),
    "export": (_export, "make one file of a model: weights, or a graph with its heatmap"),
}

if __name__ == "__main__":
    sys.exit(main())
