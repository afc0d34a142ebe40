"""Predictions of batches of images, as rows of a table."""

from collections.abc import Sequence

import numpy as np
import torch

from visionattn.batches.arrow import pa
from visionattn.batches.pictures import Row
from visionattn.batches.runner import FACTS, BatchRunner, Values
from visionattn.errors import UsageError
from visionattn.overlays import is_detector, predictions_of


class Predictor(BatchRunner):
    """Predicts the class of every image of a batch.

        >>> import numpy as np, timm
        >>> from visionattn.data import encode_image
        >>> predict = Predictor(timm.create_model("test_vit", num_classes=2), class_names=["cat", "dog"])
        >>> picture = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        >>> predict({"path": ["a.png"], "bytes": [encode_image(picture, ".png")]}).num_rows
        1

    The columns of the table are
        path: the name of the image, "" if the batch has none;
        error: why there is no prediction, else null;
        width, height: of the picture, in pixels;
        prediction, class, probability: index, name and probability of the most probable class;
        labels: for a model of independent labels, the names of all labels above its threshold, else null.

    Args:
        model: a model, a checkpoint's path, a name for `visionattn.load_model`, or a function that returns a model.
        options: see `BatchRunner`.
    """

    schema = pa.schema(
        [
            *FACTS,
            ("labels", pa.list_(pa.string())),
        ]
    )

    def _values(self, rows: Sequence[Row]) -> list[Values]:
        explainer = self.explainer
        if is_detector(explainer.model):
            raise UsageError("Predictor predicts classes; for the boxes of a detector use Explainer or `predict`")
        pictures = [picture for row in rows if (picture := row.picture) is not None]
        images_BCHW = torch.from_numpy(np.stack([explainer.preprocess(picture)[0] for picture in pictures]))
        with torch.no_grad():
            output = explainer.model(explainer.batch(images_BCHW))
        predictions = predictions_of(explainer, output, len(pictures))
        if all(prediction.index is None for prediction in predictions):
            raise UsageError(f"this {type(explainer.model).__name__} returns no scores of classes to predict from")
        return [
            {
                "width": picture.shape[1],
                "height": picture.shape[0],
                "prediction": prediction.index,
                "class": prediction.class_name,
                "probability": prediction.probability,
                "labels": None if prediction.labels is None else [name for name, _ in prediction.labels],
            }
            for picture, prediction in zip(pictures, predictions, strict=True)
        ]
