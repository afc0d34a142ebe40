"""The verb `export`: make one file of a model."""

import argparse
import os

from visionattn.commands.options import Parser, add_model, load
from visionattn.errors import UsageError

_SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch_export": ".pt2"}

_FORMATS = """formats:
  safetensors    .safetensors  weights of a checkpoint without a place for code; every verb takes it as --ckpt
  onnx           .onnx         a graph: images → scores and heatmap, for any runtime of ONNX
  torch_export   .pt2          the same graph for torch.export.load"""


def parser(verb: str) -> argparse.ArgumentParser:
    """Build the parser of `visionattn export`."""
    parser = Parser(
        prog=f"visionattn {verb}",
        description="Make one file of a model for others to run or to load.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_FORMATS,
    )
    add_model(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write: .safetensors, .onnx or .pt2")
    parser.add_argument("--format", choices=tuple(_SUFFIXES), help="see below; by the ending of FILE")
    parser.add_argument("--method", metavar="NAME", help="of the heatmap in a graph: raw, rollout, gate or gradcam")
    return parser


def run(arguments: list[str]) -> int:
    """Run a command line, whose first word is the verb, and return the exit code."""
    options = parser(arguments[0]).parse_args(arguments[1:])
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
    from visionattn.commands.graph import export_graph

    model, preprocess, class_names = load(options)
    told = export_graph(model.cpu(), options.out, method=options.method, preprocess=preprocess, class_names=class_names)
    size = " × ".join(map(str, told.input_size))
    print(f"wrote {options.out}   images (B, {size}) → scores, heatmap by {told.method}")
    if told.difference is None:
        print("not compared with the model, since onnxruntime is not installed")
    else:
        print(f"differs from the model by at most {told.difference:.1g} on noise")
    return 0
