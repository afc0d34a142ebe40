from .explainer import Explainer as Explainer
from .pictures import Columns as Columns
from .predictor import Predictor as Predictor
