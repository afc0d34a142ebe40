"""The verb `data`: check a data set."""

import argparse
import sys

from visionattn.commands.options import Parser
from visionattn.errors import UsageError


def parser(verb: str) -> argparse.ArgumentParser:
    """Build the parser of `visionattn data`."""
    parser = Parser(prog=f"visionattn {verb}", description="Look at a folder of annotated images.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    check_parser = verbs.add_parser("check", help="list all that is wrong with the annotations of a data set")
    check_parser.add_argument("path", metavar="PATH", help="a folder in COCO's, Pascal VOC's or YOLO's layout")
    check_parser.add_argument("--images", metavar="DIR", help="the images, where they are in none of the usual places")
    check_parser.add_argument("--box-format", choices=("xyxy", "xywh", "cxcywh"), help="of the numbers in the files")
    check_parser.add_argument("--limit", type=int, metavar="N", help="list at most so many problems of a kind")
    return parser


def run(arguments: list[str]) -> int:
    """Run a command line, whose first word is the verb, and return the exit code."""
    options = parser(arguments[0]).parse_args(arguments[1:])
    if options.limit is not None and options.limit < 1:
        raise UsageError(f"--limit must be at least 1, got {options.limit}")

    from visionattn.data.annotations.checks import check

    report = check(options.path, images=options.images, box_format=options.box_format)
    encoding = sys.stdout.encoding or "utf-8"  # names may hold what it has no character for
    print("\n".join(report.lines(options.limit)).encode(encoding, "backslashreplace").decode(encoding))
    return int(bool(report.problems))
