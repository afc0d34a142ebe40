"""Heatmaps and overlays of batches of images, as rows of a table."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from visionattn.batches.arrow import pa
from visionattn.batches.pictures import Row
from visionattn.batches.runner import FACTS, BatchRunner, Model, Values
from visionattn.data import encode_image
from visionattn.drawing import Style
from visionattn.errors import DataError, UsageError
from visionattn.maps import Method
from visionattn.overlays import OUTPUTS, Heatmap, OutputScene, heatmap

SAVE = ("heat", "overlay")
"""What an explainer can save besides the facts of each image."""


class Explainer(BatchRunner):
    """Computes a heatmap of every image of a batch.

        >>> import numpy as np, timm
        >>> from visionattn.data import encode_image
        >>> explain = Explainer(timm.create_model("test_vit"), method="rollout")
        >>> picture = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        >>> table = explain({"bytes": [encode_image(picture, ".png"), b"no image"]})
        >>> table.num_rows, table["error"].to_pylist()
        (2, [None, 'the image is not an image that can be read'])

    The columns of the table are
        path: the name of the image, "" if the batch has none;
        error: why there is no heatmap, else null;
        width, height: of the picture, in pixels;
        prediction, class, probability: index, name and probability of the predicted class, null if unknown;
        method, layer: name of the method, and the layers that it reads, e.g. "all 6 layers of attention";
        target: index of the explained output, null if the method explains no particular output;
        peak: the hottest point, [x, y] in pixels of the picture, null if the heatmap is constant;
        heat: the heatmap on the model's grid, in [0, 1], as float16 in little-endian order, row after row;
        heat_shape: [rows, columns] of this grid;
        placement: six numbers [a, b, c, d, e, f], the grid point of the pixel (x, y) is (a x + b y + c, d x + e y + f);
            a grid point (0, 0) is the corner of the grid, and (columns, rows) the opposite one;
        overlay: the picture with the heatmap over it, as the content of an image file.
    Columns that are not saved are null.

    Args:
        model: a model, a checkpoint's path, a name for `visionattn.load_model`, or a function that returns a model.
        method: name of a method, or a method (default: one that fits the model).
        layer: see `overlays.heatmap`.
        target: index or class name of the output to explain, for all rows without an own target (default: the highest
            output of each image).
        save: what to save besides the facts, names in `SAVE`.
        style: style of the overlays; its `suffix` chooses their format (default: `Style()`).
        options: see `BatchRunner`.

    Raises:
        UsageError: `save` has an unknown name.
    """

    schema = pa.schema(
        [
            *FACTS,
            ("method", pa.string()),
            ("layer", pa.string()),
            ("target", pa.int32()),
            ("peak", pa.list_(pa.float32())),
            ("heat", pa.binary()),
            ("heat_shape", pa.list_(pa.int32())),
            ("placement", pa.list_(pa.float32())),
            ("overlay", pa.binary()),
        ]
    )

    def __init__(
        self,
        model: Model,
        *,
        method: str | Method | None = None,
        layer: int | str | None = None,
        target: int | str | None = None,
        save: Sequence[str] = ("heat",),
        style: Style | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        if unknown := [name for name in save if name not in SAVE]:
            raise UsageError(f"save has {unknown[0]!r}; it can have {' and '.join(SAVE)}")
        self._method, self._layer, self._target = method, layer, target
        self._save = tuple(save)
        self._style = style or Style()

    def _values(self, rows: Sequence[Row]) -> list[Values]:
        explainer = self.explainer
        try:
            default = explainer.target(self._target)
        except DataError as error:
            raise UsageError(str(error)) from error
        targets = [default if row.target is None else explainer.target(row.target) for row in rows]
        values: dict[int, Values] = {}
        for given in (True, False):
            group = [index for index, target in enumerate(targets) if (target is not None) == given]
            if group:
                chosen = [target for index in group if (target := targets[index]) is not None]
                pictures = [picture for index in group if (picture := rows[index].picture) is not None]
                found = heatmap(
                    explainer.model,
                    pictures,
                    method=self._method,
                    layer=self._layer,
                    target=chosen or None,
                    preprocess=explainer.preprocess,
                    class_names=explainer.class_names,
                )
                values.update(zip(group, map(self._row, found), strict=True))
        return [values[index] for index in range(len(rows))]

    def _row(self, found: Heatmap) -> Values:
        grid_hw, placement = found.explained.heatmap_hw, found.explained.placement
        height, width = placement.source_size
        scale = np.array([[grid_hw.shape[1] / placement.input_size[1]], [grid_hw.shape[0] / placement.input_size[0]]])
        return {
            "width": width,
            "height": height,
            "prediction": found.prediction,
            "class": found.class_name,
            "probability": found.probability,
            "method": found.method,
            "layer": found.source,
            "target": found.target,
            "peak": found.peak,
            "heat": grid_hw.astype("<f2").tobytes() if "heat" in self._save else None,
            "heat_shape": grid_hw.shape if "heat" in self._save else None,
            "placement": (placement.matrix * scale).ravel().tolist() if "heat" in self._save else None,
            "overlay": self._drawn(found) if "overlay" in self._save else None,
        }

    def _drawn(self, found: Heatmap) -> bytes:
        drawn_HWC = OUTPUTS["overlay"].make(OutputScene(found.image, [found.explained], self._style))
        assert isinstance(drawn_HWC, np.ndarray)  # other kinds of output are arrays by name, or bytes
        return encode_image(drawn_HWC, self._style.suffix)
