"""The verb `data`: check a data set."""

import argparse
import sys

from visionattn.commands.options import Parser
from visionattn.errors import UsageError


def parser(verb: str) -> argparse.ArgumentParser:
    """Build the parser of `visionattn data`."""
    parser = Parser(prog=f"visionattn {verb}", description="Check a folder of annotated images.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    check_parser = verbs.add_parser("check", help="list every problem in the annotations of a data set")
    check_parser.add_argument(
        "path", metavar="PATH", help="folder in the layout of COCO, Pascal VOC or YOLO (required)"
    )
    check_parser.add_argument(
        "--images", metavar="DIR", help="folder of the images (default: the usual places of the layout)"
    )
    check_parser.add_argument(
        "--box-format",
        choices=("xyxy", "xywh", "cxcywh"),
        help="meaning of a box's four numbers in the files (default: that of the layout)",
    )
    check_parser.add_argument(
        "--limit", type=int, metavar="INT", help="largest number of problems to list of each kind (default: all)"
    )
    return parser


def run(arguments: list[str]) -> int:
    """Check a data set and return the exit code: 1 if there are problems, else 0.

    Args:
        arguments: the command line after `visionattn`; its first word is the verb.

    Raises:
        UsageError: a flag is wrong.
        DataError: the data set cannot be read.
    """
    options = parser(arguments[0]).parse_args(arguments[1:])
    if options.limit is not None and options.limit < 1:
        raise UsageError(f"--limit must be at least 1, got {options.limit}")

    from visionattn.data import check

    report = check(options.path, images=options.images, box_format=options.box_format)
    encoding = sys.stdout.encoding or "utf-8"  # file names may hold characters that the terminal's encoding lacks
    print("\n".join(report.lines(options.limit)).encode(encoding, "backslashreplace").decode(encoding))
    return int(bool(report.problems))
