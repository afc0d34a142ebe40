"""The command line: `visionattn VERB …`. A verb's module is imported when the verb is called."""

import importlib
import os
import sys
from collections.abc import Sequence

from visionattn.errors import DataError, UsageError, nearest
from visionattn.signals import Stopped, watched

# verb → (module, one-line description). Each module has `parser(verb)`, which builds the verb's ArgumentParser, and
# `run(arguments)`, which runs the verb and returns the exit code.
_VERBS = {
    "fit": ("visionattn.commands.train", "train from a YAML config"),
    "validate": ("visionattn.commands.train", "score a checkpoint on the validation images"),
    "test": ("visionattn.commands.train", "score a checkpoint on the test images and write a report with overlays"),
    "predict": ("visionattn.commands.train", "write the predicted classes or boxes of images"),
    "data": ("visionattn.commands.data", "check a data set: visionattn data check PATH"),
    "overlay": ("visionattn.commands.overlay", "draw heatmaps of a model over images"),
    "explore": ("visionattn.commands.explore", "write a page to explore a model's attention and heatmaps"),
    "score": ("visionattn.commands.score", "measure whether a method's heatmaps can be trusted"),
    "push": ("visionattn.commands.push", "upload a model to the Hugging Face hub"),
    "completion": ("visionattn.commands.completion", "print a shell's completion script"),
    "export": (
        "visionattn.commands.export",
        "write weights, or a graph that computes scores and a heatmap, to one file",
    ),
}

_SHARED_BY_PROCESSES = ("fit", "validate", "test", "predict", "overlay")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb of the command line.

    Args:
        arguments: the verb and its options. Default: `sys.argv[1:]`.

    Returns:
        The exit code: 0 for success, 1 for data that cannot be used, 2 for a wrong call, 130 after Ctrl-C, 143 after
        SIGTERM.
    """
    # OpenMP's threads spin for milliseconds while they wait for each other. When other processes used the same cores,
    # spinning made a training step of the quickstart 6 times as long (214 ms instead of 34 ms). We measured no case in
    # which long spinning was faster. GOMP_SPINCOUNT limits the spinning; set it before torch is imported.
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
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"visionattn {version('visionattn')}")
        return 0
    verb = arguments[0]
    if verb not in _VERBS:
        raise UsageError(f"visionattn has no verb {verb!r}.{nearest(verb, _VERBS)} See visionattn --help.")
    _refuse_several_processes(verb)
    module = importlib.import_module(_VERBS[verb][0])
    if verb == "completion":  # the only verb that needs the parsers of the others
        return int(module.run(arguments, _VERBS))
    return int(module.run(arguments))


def _refuse_several_processes(verb: str) -> None:
    """Refuse a verb that torchrun or SLURM's srun has started several times, if its processes cannot share the work."""
    if verb in _SHARED_BY_PROCESSES:
        return
    for variable in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):  # the number of processes: torchrun, srun
        if os.environ.get(variable, "1") not in ("", "1"):
            raise UsageError(
                f"visionattn {verb} runs in one process, and {variable} says that {os.environ[variable]} were "
                "started; start it without torchrun or srun"
            )


def _help() -> str:
    width = max(map(len, _VERBS))
    return "\n".join(
        [
            "usage: visionattn VERB [OPTIONS]",
            "",
            "Train vision models with attention, draw their heatmaps, and measure whether the heatmaps can be trusted.",
            "",
            *(f"  {verb:<{width}}  {text}" for verb, (_, text) in _VERBS.items()),
            "",
            "  visionattn VERB --help     the options of a verb",
            "  visionattn --version",
            "  --debug                    with any verb: show the traceback of an error",
            "",
            "First steps:",
            "  visionattn overlay --demo                          draw heatmaps over photographs",
            "  visionattn fit --config configs/quickstart.yaml    train a small network in a minute",
        ]
    )
