from .base import CHECKPOINT_ENTRY as CHECKPOINT_ENTRY
from .base import Task as Task
from .base import check_num_classes as check_num_classes
from .base import renumbered as renumbered
from .classification import Classification as Classification
from .detection import Detection as Detection
from .glimpses import GlimpseClassification as GlimpseClassification
from .multi_label import MultiLabelClassification as MultiLabelClassification
