"""Running trainings: the command line's Lightning verbs, checkpoints, and the callbacks that Lightning lacks."""

from typing import TYPE_CHECKING

from visionattn._lazy import lazy

if TYPE_CHECKING:
    from visionattn.training.callbacks import DrawSpans as DrawSpans
    from visionattn.training.callbacks import OverlaySamples as OverlaySamples
    from visionattn.training.callbacks import TestReport as TestReport
    from visionattn.training.callbacks import WritePredictions as WritePredictions
    from visionattn.training.checkpoints import export as export
    from visionattn.training.checkpoints import load as load
    from visionattn.training.hub import push as push
    from visionattn.training.quiet import quieten as quieten

__getattr__, __dir__ = lazy(
    __name__,
    {
        "callbacks": ("DrawSpans", "OverlaySamples", "TestReport", "WritePredictions"),
        "checkpoints": ("export", "load"),
        "hub": ("push",),
        "quiet": ("quieten",),
    },
)
