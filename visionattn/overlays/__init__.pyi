from .explainer import View as View
from .folder.export import export as export
from .folder.progress import Summary as Summary
from .glimpses import follow_gaze as follow_gaze
from .heatmaps import Heatmap as Heatmap
from .heatmaps import heatmap as heatmap
from .heatmaps import overlay as overlay
