from .callbacks.overlay_samples import OverlaySamples as OverlaySamples
from .callbacks.predictions import WritePredictions as WritePredictions
from .callbacks.report import TestReport as TestReport
from .callbacks.span_pictures import DrawSpans as DrawSpans
from .checkpoints import export as export
from .checkpoints import load as load
from .publishing import push as push
from .third_party_warnings import quieten as quieten
