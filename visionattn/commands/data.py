"""The verb `data`: check a data set."""

import argparse
import sys
from collections.abc import Iterable
from typing import TypeVar

from visionattn.commands.options import Parser
from visionattn.errors import UsageError

_T = TypeVar("_T")


def parser(verb: str) -> argparse.ArgumentParser:
    """Build the parser of `visionattn data`."""
    parser = Parser(prog=f"visionattn {verb}", description="Check a folder of images.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    check_parser = verbs.add_parser("check", help="list every problem in the images and annotations of a data set")
    check_parser.add_argument(
        "path",
        metavar="PATH",
        help="folder in the layout of COCO, Pascal VOC or YOLO, or with a sub-folder for each class (required)",
    )
    check_parser.add_argument(
        "--images", metavar="DIR", help="folder of the images (default: the folders that the layout prescribes)"
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

    from rich.console import Console
    from rich.progress import track

    from visionattn.data import check, check_folder, has_classes

    console = Console(stderr=True)

    def progress(results: Iterable[_T], total: int) -> Iterable[_T]:
        return track(results, options.path, total, console=console, transient=True, disable=not console.is_terminal)

    if not options.images and not options.box_format and has_classes(options.path):
        report = check_folder(options.path, progress=progress)
    else:
        report = check(options.path, images=options.images, box_format=options.box_format, progress=progress)
    encoding = sys.stdout.encoding or "utf-8"  # file names may contain characters that the terminal's encoding lacks
    print("\n".join(report.lines(options.limit)).encode(encoding, "backslashreplace").decode(encoding))
    return int(bool(report.problems))
