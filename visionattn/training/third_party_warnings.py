"""What libraries say that a user cannot act on."""

import logging
import os
import warnings


def quieten() -> None:
    """Keep what a user cannot act on off the screen: Lightning's lines about the machine, libraries' warnings of each
    other, matplotlib's of its fonts. The command line does it; in a notebook call it first."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for library in ("lightning", "torch", "torchmetrics", "timm", "albumentations", "jsonargparse", "tqdm"):
        warnings.filterwarnings("ignore", module=library)
    import lightning.pytorch  # noqa: F401  # its import sets the level of its logger, and would undo ours

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # in a fresh environment it counts them
