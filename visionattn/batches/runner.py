"""What explainers and predictors of batches share: the model is loaded on first use, and every image becomes a row."""

import copy
import os
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import nn

from visionattn.batches.arrow import pa
from visionattn.batches.pictures import Columns, Row, read_rows
from visionattn.data import MAX_PIXELS, Preprocess
from visionattn.errors import DataError, UsageError
from visionattn.models import load_model
from visionattn.overlays import Explainer, assumed_preprocess, describe_model
from visionattn.training import load

Model: TypeAlias = nn.Module | str | os.PathLike[str] | Callable[[], nn.Module]
"""A model; a checkpoint's path (.ckpt, .safetensors or hf://owner/name); a name for `visionattn.load_model`; or a
function that returns a model."""

_CHECKPOINTS = (".ckpt", ".safetensors")

Values: TypeAlias = Mapping[str, object]
"""Column → value of one row."""


FACTS = [
    ("path", pa.string()),
    ("error", pa.string()),
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("prediction", pa.int32()),
    ("class", pa.string()),
    ("probability", pa.float32()),
]
"""The first columns of every table: the image, why it failed, its size, and its most probable class."""

_loading = threading.RLock()
_MAX_EXPLAINERS = 4
_explainers: dict[str, Explainer] = {}
"""Key of a runner → its loaded model. An engine may send a new copy of a runner with every batch; the copies have one
key, so they share the model that a process has loaded."""


class BatchRunner(ABC):
    """Turns batches of images into tables, one row for each image.

    An object can be pickled, so an engine can send it to other processes. The model is loaded on the first call, once
    in each process. A process keeps the models of the four objects that were used last.

    Args:
        model: see `Model`. A given module is copied, and stays as it is.
        preprocess: prepares a picture (default: the model's own, see `overlays.heatmap`).
        class_names: names of the outputs (default: the model's own).
        trust: packages whose classes a checkpoint may use, see `visionattn.load`.
        device: `"auto"` is the first GPU if there is one, else the CPU.
        max_pixels: larger pictures become rows with an error.
    """

    schema: pa.Schema
    """Columns of the tables that a call returns, the same for every batch."""

    def __init__(
        self,
        model: Model,
        *,
        preprocess: Preprocess | None = None,
        class_names: Sequence[str] = (),
        trust: Sequence[str] = (),
        device: str = "auto",
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self._model = copy.deepcopy(model) if isinstance(model, nn.Module) else model
        self._preprocess = preprocess
        self._class_names = tuple(class_names)
        self._trust = tuple(trust)
        self._device = device
        self._max_pixels = max_pixels
        self._key = uuid.uuid4().hex

    @property
    def explainer(self) -> Explainer:
        """The model with its preprocessing and class names. The first use in a process loads the model.

        Raises:
            UsageError: there is no such model or device.
            DataError: its files cannot be used.
        """
        with _loading:
            explainer = _explainers.pop(self._key, None) or self._load()
            _explainers[self._key] = explainer  # the last in the order of use
            while len(_explainers) > _MAX_EXPLAINERS:
                del _explainers[next(iter(_explainers))]
        return explainer

    def _load(self) -> Explainer:
        network, preprocess, class_names = describe_model(_loaded(self._model, self._trust))
        preprocess = self._preprocess or preprocess or assumed_preprocess(network, stacklevel=5)
        try:
            network = network.to(_device(self._device)).eval()
        except (RuntimeError, AssertionError) as error:  # torch without CUDA raises an AssertionError
            raise UsageError(f"device {self._device!r} cannot be used: {error}") from error
        return Explainer(network, preprocess, class_names=self._class_names or class_names)

    def __call__(self, columns: Columns) -> pa.Table:
        """Make one row for each image, in the order of the batch.

        An image that cannot be read or explained becomes a row whose column `error` says why; its other columns are
        null. An empty batch becomes an empty table.

        Args:
            columns: a mapping of column names to sequences, a pandas data frame or a `pyarrow.Table`, with a column
                `path` (file names or URLs) or `bytes` (the content of image files); if it has both, `path` is only a
                name. An optional column `target` has the index or the class name of the output to explain, or null.

        Returns:
            A table with the columns of `schema`.

        Raises:
            UsageError: the batch has neither `path` nor `bytes`, or the method does not fit the model.
            DataError: the model cannot be loaded.
        """
        rows = read_rows(columns, max_pixels=self._max_pixels)
        good = [row for row in rows if row.picture is not None]
        values = dict(zip(map(id, good), self._run(good) if good else [], strict=True))
        table = [{"path": row.path, **values.get(id(row), {"error": row.error})} for row in rows]
        return pa.Table.from_pylist(table, schema=self.schema)

    def _run(self, rows: Sequence[Row]) -> list[Values]:
        """Compute the columns of rows with pictures. If the batch fails, each half runs alone, so one image fails."""
        try:
            return self._values(rows)
        except (DataError, UsageError, torch.OutOfMemoryError) as error:
            if isinstance(error, UsageError) and all(row.target is None for row in rows):
                raise  # the method does not fit the model; no row is to blame
            if len(rows) == 1:
                if isinstance(error, UsageError):
                    self._values([replace(rows[0], target=None)])  # raises if the method does not fit the model
                return [{"error": str(error)}]
        half = len(rows) // 2
        return [*self._run(rows[:half]), *self._run(rows[half:])]

    @abstractmethod
    def _values(self, rows: Sequence[Row]) -> list[Values]:
        """Return the columns of each row.

        Raises:
            DataError: a picture or a target cannot be used.
            UsageError: the model or the method cannot be used.
        """


def _loaded(model: Model, trust: Sequence[str]) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, (str, os.PathLike)):
        name = os.fspath(model)
        return load(name, trust=trust) if name.startswith("hf://") or name.endswith(_CHECKPOINTS) else load_model(name)
    made = model()
    if not isinstance(made, nn.Module):
        raise UsageError(f"the function that makes the model returned a {type(made).__name__}; return a torch Module")
    return made


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
