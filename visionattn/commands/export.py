"""The verb `export`: write a model into one file, as weights or as a graph."""

import argparse
import os

from visionattn.commands.options import Parser, add_model, load
from visionattn.errors import UsageError

_SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch_export": ".pt2"}

_FORMATS = """formats:
  safetensors    .safetensors  weights of a checkpoint, in a format without code; every verb accepts the file as --ckpt
  onnx           .onnx         a graph: images → scores and heatmap, for any ONNX runtime
  torch_export   .pt2          the same graph, for torch.export.load"""


def parser(verb: str) -> argparse.ArgumentParser:
    """Build the parser of `visionattn export`."""
    parser = Parser(
        prog=f"visionattn {verb}",
        description="Write a model into one file that others can run or load.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_FORMATS,
    )
    add_model(parser)
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="file to write: .safetensors, .onnx or .pt2 (required)"
    )
    parser.add_argument(
        "--format", choices=tuple(_SUFFIXES), help="file format, see below (default: given by the suffix of --out)"
    )
    parser.add_argument(
        "--method",
        metavar="NAME",
        help="heatmap method of a graph: raw, rollout, gate or gradcam (default: one that fits the model)",
    )
    return parser


def run(arguments: list[str]) -> int:
    """Write the file and return the exit code 0.

    Args:
        arguments: the command line after `visionattn`; its first word is the verb.

    Raises:
        UsageError: a flag is wrong, or the method does not fit the model.
        DataError: the model cannot be read or traced, or the file cannot be written.
    """
    options = parser(arguments[0]).parse_args(arguments[1:])
    suffix = os.path.splitext(options.out)[1]
    expected = _SUFFIXES.get(options.format, suffix)
    if expected != suffix or suffix not in _SUFFIXES.values():
        known = ", ".join(_SUFFIXES.values())
        suffixes = f"{expected} with --format {options.format}" if options.format else f"one of {known}"
        raise UsageError(f"--out must end in {suffixes}, got {options.out}")
    if suffix == ".safetensors":
        if options.method or not options.ckpt:
            raise UsageError("a .safetensors file holds only weights of a checkpoint; pass --ckpt, and no --method")
        from visionattn.training import export

        export(options.ckpt, options.out)
        print(f"wrote {options.out}")
        return 0
    from visionattn.commands.graph import check_suffix, export_graph

    check_suffix(options.out)  # before the model is loaded
    model, preprocess, class_names = load(options)
    exported = export_graph(
        model.cpu(), options.out, method=options.method, preprocess=preprocess, class_names=class_names
    )
    size = " × ".join(map(str, exported.input_size))
    print(f"wrote {options.out}   images (B, {size}) → scores, heatmap by {exported.method}")
    if exported.difference is None:
        print("not compared with the model, because onnxruntime is not installed")
    else:
        print(f"differs from the model by at most {exported.difference:.1g} on random input")
    return 0
