"""The verb `export`: write a model into one file, as weights or as a graph."""

import argparse
import os

from visionattn.commands.options import Parser, add_model, load
from visionattn.errors import UsageError

_SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch_export": ".pt2"}

_FORMATS = """formats:
  safetensors    .safetensors  weights of a checkpoint, in a format that cannot hold code; every verb takes it as --ckpt
  onnx           .onnx         a graph: images → scores and heatmap, for any runtime of ONNX
  torch_export   .pt2          the same graph for torch.export.load"""


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
        "--format", choices=tuple(_SUFFIXES), help="format, see below (default: the one of the suffix of --out)"
    )
    parser.add_argument(
        "--method",
        metavar="NAME",
        help="method of the heatmap in a graph: raw, rollout, gate or gradcam (default: the first that fits the model)",
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
        suffixes = expected if options.format else "one of " + ", ".join(_SUFFIXES.values())
        raise UsageError(f"--out must end in {suffixes}, the suffix of its format; got {options.out}")
    if suffix == ".safetensors":
        if options.method or not options.ckpt:
            raise UsageError("a .safetensors file holds the weights of a --ckpt and no method; leave --method out")
        from visionattn.training import export

        export(options.ckpt, options.out)
        print(f"wrote {options.out}")
        return 0
    from visionattn.commands.graph import export_graph

    model, preprocess, class_names = load(options)
    exported = export_graph(
        model.cpu(), options.out, method=options.method, preprocess=preprocess, class_names=class_names
    )
    size = " × ".join(map(str, exported.input_size))
    print(f"wrote {options.out}   images (B, {size}) → scores, heatmap by {exported.method}")
    if exported.difference is None:
        print("not compared with the model, because onnxruntime is not installed")
    else:
        print(f"differs from the model by at most {exported.difference:.1g} on noise")
    return 0
