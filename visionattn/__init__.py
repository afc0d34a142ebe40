"""Attention in computer vision: train models that attend, see where they looked, and measure whether to believe it.

The names below are imported when they are first used; `import visionattn` itself costs nothing.
"""

from typing import TYPE_CHECKING

from visionattn._lazy import lazy

if TYPE_CHECKING:
    from visionattn.attention.insertion import insert as insert
    from visionattn.overlay.explorer import explore as explore
    from visionattn.training.checkpoints import load as load

__getattr__, __dir__ = lazy(
    __name__,
    {"attention.insertion": ("insert",), "overlay.explorer": ("explore",), "training.checkpoints": ("load",)},
)
