"""The verb `push`: put a model on the Hugging Face hub."""

import argparse

from visionattn.commands.options import Parser


def parser(verb: str) -> argparse.ArgumentParser:
    """Build the parser of `visionattn push`."""
    parser = Parser(
        prog=f"visionattn {verb}",
        description="Put a model on the Hugging Face hub: safetensors, JSON, and a card with results and an overlay. "
        "Every verb takes it from there as --ckpt hf://OWNER/NAME.",
    )
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="a checkpoint that visionattn fit wrote")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="on the hub; made if there is none")
    parser.add_argument("--picture", metavar="FILE", help="whose overlay the card shows; the run's overlays/test.png")
    parser.add_argument("--public", action="store_true", help="a repository that is made here is public")
    return parser


def run(arguments: list[str]) -> int:
    """Run a command line, whose first word is the verb, and return the exit code."""
    options = parser(arguments[0]).parse_args(arguments[1:])

    from visionattn.training.publishing import push

    print(push(options.ckpt, options.repo, picture=options.picture, private=not options.public))
    return 0
