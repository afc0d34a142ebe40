"""The verb `data`: check a data set."""

import argparse
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

from visionattn.commands.options import Parser
from visionattn.errors import UsageError

if TYPE_CHECKING:
    from visionattn.data import Columns

_T = TypeVar("_T")
_OF_TABLES = ("path_column", "label_column", "split_column", "separator")


def parser(verb: str) -> argparse.ArgumentParser:
    """Build the parser of `visionattn data`."""
    parser = Parser(prog=f"visionattn {verb}", description="Check a folder, a table or shards of images.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    check_parser = verbs.add_parser("check", help="list every problem in the images and annotations of a data set")
    check_parser.add_argument(
        "path",
        metavar="PATH",
        help="folder in the layout of COCO, Pascal VOC or YOLO, or with a sub-folder for each class; or a .csv, .tsv "
        "or .parquet table of image paths and labels; or a .tar shard, a quoted pattern of shards, a folder of shards, "
        "or their .json index (required)",
    )
    check_parser.add_argument(
        "--images",
        metavar="DIR",
        help="folder of the images (default: the folders that the layout prescribes, or the table's)",
    )
    check_parser.add_argument(
        "--box-format",
        choices=("xyxy", "xywh", "cxcywh"),
        help="meaning of a box's four numbers in the files (default: that of the layout)",
    )
    table = check_parser.add_argument_group("for tables")
    table.add_argument("--path-column", metavar="NAME", help="column of the image's path (default: path)")
    table.add_argument(
        "--label-column",
        nargs="+",
        metavar="NAME",
        help="column of the label; several names: a column of 0 and 1 for each class (default: labels or label)",
    )
    table.add_argument("--split-column", metavar="NAME", help="column of the split (default: split, if it is there)")
    table.add_argument(
        "--separator",
        metavar="TEXT",
        help="text between the labels of an image (default: | in the column labels; otherwise an image has one label)",
    )
    check_parser.add_argument(
        "--classes",
        metavar="FILE",
        help="for shards: text file with one class name a line (default: the texts in their .cls files)",
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

    from visionattn.data import check, check_folder, check_shards, check_table, has_classes, has_shards, is_table

    console = Console(stderr=True)

    def progress(results: Iterable[_T], total: int) -> Iterable[_T]:
        return track(results, options.path, total, console=console, transient=True, disable=not console.is_terminal)

    shards = not is_table(options.path) and has_shards(options.path)
    if options.classes and not shards:
        raise UsageError(f"--classes is for shards, and {options.path} is none")
    if is_table(options.path):
        if options.box_format:
            raise UsageError("--box-format is for folders with boxes; a table has none")
        report = check_table(options.path, _columns(options), root=options.images, progress=progress)
    elif named := next((name for name in _OF_TABLES if getattr(options, name) is not None), None):
        raise UsageError(f"--{named.replace('_', '-')} is for tables, and {options.path} is none")
    elif shards:
        if options.images or options.box_format:
            raise UsageError("--images and --box-format are for folders with boxes; shards have none")
        report = check_shards(options.path, class_names=options.classes, progress=progress)
    elif not options.images and not options.box_format and has_classes(options.path):
        report = check_folder(options.path, progress=progress)
    else:
        report = check(options.path, images=options.images, box_format=options.box_format, progress=progress)
    encoding = sys.stdout.encoding or "utf-8"  # file names may contain characters that the terminal's encoding lacks
    print("\n".join(report.lines(options.limit)).encode(encoding, "backslashreplace").decode(encoding))
    return int(bool(report.problems))


def _columns(options: argparse.Namespace) -> "Columns":
    """Return the columns that the options name, with the defaults of `find_columns` for the others."""
    from visionattn.data import find_columns

    labels = options.label_column
    return find_columns(
        options.path,
        path=options.path_column or "path",
        labels=labels[0] if labels and len(labels) == 1 else labels,
        split=options.split_column or "split",
        separator=options.separator or None,
    )
