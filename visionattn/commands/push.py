"""The verb `push`: upload a model to the Hugging Face hub."""

import argparse

from visionattn.commands.options import Parser


def parser(verb: str) -> argparse.ArgumentParser:
    """Build the parser of `visionattn push`."""
    parser = Parser(
        prog=f"visionattn {verb}",
        description="Upload a model to the Hugging Face hub: weights as safetensors, a description as JSON, and a card "
        "with results and an overlay. Every verb then accepts --ckpt hf://OWNER/NAME.",
    )
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint written by visionattn fit (required)")
    parser.add_argument(
        "--repo", required=True, metavar="OWNER/NAME", help="repository on the hub, created if missing (required)"
    )
    parser.add_argument(
        "--picture",
        metavar="FILE",
        help="image to draw an overlay of, for the card (default: the card shows the run's overlays/test.png)",
    )
    parser.add_argument(
        "--public", action="store_true", help="make a newly created repository public (default: private)"
    )
    return parser


def run(arguments: list[str]) -> int:
    """Upload the model, print the address of its repository and return the exit code 0.

    Args:
        arguments: the command line after `visionattn`; its first word is the verb.

    Raises:
        UsageError: a flag is wrong, or there is no picture for the card.
        DataError: the checkpoint or the picture cannot be read, or the upload fails.
    """
    options = parser(arguments[0]).parse_args(arguments[1:])

    from visionattn.training import push

    print(push(options.ckpt, options.repo, picture=options.picture, private=not options.public))
    return 0
