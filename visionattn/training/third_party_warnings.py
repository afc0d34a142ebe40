"""Silence third-party warnings that users cannot act on."""

import logging
import os
import threading
import warnings
from collections.abc import Callable


def silence_third_party_warnings() -> None:
    """Silence third-party messages that users cannot act on.

    Such messages are Lightning's information about the machine, deprecation warnings that one library causes in
    another, matplotlib's messages about fonts, and the traceback of TensorBoard's thread if it cannot write (the main
    thread raises the same error). The command line calls this function. In a notebook, call this
    function before training.
    """
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for library in ("lightning", "torch", "torchmetrics", "timm", "albumentations", "jsonargparse", "tqdm"):
        warnings.filterwarnings("ignore", module=library)
    import lightning.pytorch  # noqa: F401  # the import sets the level of Lightning's logger, so import before setting it

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # hides "building the font cache"
    if not isinstance(threading.excepthook, _ThreadHook):
        threading.excepthook = _ThreadHook(threading.excepthook)


class _ThreadHook:
    """Report the errors of threads, except an OSError of TensorBoard's writer, which the main thread raises again."""

    def __init__(self, report: Callable[[threading.ExceptHookArgs], object]) -> None:
        self.report = report

    def __call__(self, args: threading.ExceptHookArgs, /) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
            self.report(args)
