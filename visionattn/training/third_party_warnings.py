"""Silence third-party warnings that users cannot act on."""

import logging
import os
import warnings


def silence_third_party_warnings() -> None:
    """Silence third-party messages that users cannot act on.

    These are Lightning's lines about the machine, libraries' deprecation warnings of each other, and matplotlib's
    messages about fonts. The command line calls this function; call it in a notebook before training.
    """
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for library in ("lightning", "torch", "torchmetrics", "timm", "albumentations", "jsonargparse", "tqdm"):
        warnings.filterwarnings("ignore", module=library)
    import lightning.pytorch  # noqa: F401  # importing it sets the level of its logger, so it must come first

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # it reports building its font list
