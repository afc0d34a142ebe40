from .base import Task as Task
from .classification import Classification as Classification
from .detection import Detection as Detection
from .glimpses import GlimpseClassification as GlimpseClassification
