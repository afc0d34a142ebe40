"""A model and its heatmap in one file that runs without visionattn: ONNX, or an exported program of torch.

Shapes: B images, C channels, H × W pixels of the model's input, K outputs, h × w grid.
"""

import contextlib
import dataclasses
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from visionattn.capture.running import undisturbed
from visionattn.data.placement import Preprocess, image_shape
from visionattn.errors import DataError, UsageError, nearest
from visionattn.files import write_file
from visionattn.maps.in_graph import GRAPHS, Graph
from visionattn.maps.selection import METHODS, default_method
from visionattn.overlays.explainer import detects, known_of

ENTRY = "visionattn"
"""Under which a file says how its images are prepared."""

_TOLERANCE = 1e-4
_BATCHES = 1, 3  # with which a file is checked; it was traced with 2


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        method: by which the heatmap is made.
        input_size: (C, H, W) of the images; any number of them.
        difference: between the file's outputs and the model's, the largest on noise, as a share of the largest output
            where that is above 1; None where nothing here can run the file.
    """

    method: str
    input_size: tuple[int, int, int]
    difference: float | None


def export_graph(
    model: nn.Module,
    out: str | os.PathLike[str],
    *,
    method: str | None = None,
    preprocess: Preprocess | None = None,
    class_names: Sequence[str] = (),
) -> Exported:
    """Write a model and its heatmap as one graph: `images` (B, C, H, W) → `scores` (B, K), `heatmap` (B, h, w).

        export_graph(model, "vit.onnx", method="rollout")

    The images are prepared as the model wants them, and B is free; the heatmap is in [0, 1] and spans the images. How
    they are prepared, and what the outputs are called, stands in the file as JSON: in ONNX's metadata `visionattn`, and
    in the extra file `visionattn` of a program.

    Args:
        model: any vision model, or a task that `visionattn.load` returned; it is left as it was.
        out: .onnx, or .pt2 for `torch.export.load`.
        method: raw, rollout, gate or gradcam; by default what `maps.default_method` chooses, or else the first of these
            that fits. Gradients are not part of a graph: gradcam is where a linear head follows a mean over positions,
            so that none are needed.
        preprocess: how images are prepared; models of timm and torchvision and tasks say their own.
        class_names: of the outputs; timm's models and tasks know theirs.

    Raises:
        UsageError: the suffix is another, a package that writes ONNX is missing, or the method does not fit the model.
        DataError: the model cannot be traced, the file gives other values than the model, or it cannot be written.
    """
    suffix = Path(out).suffix
    if suffix not in _WRITERS:
        raise UsageError(f"a graph is written as {' or '.join(_WRITERS)}, got {os.fspath(out)}")
    network, own, own_names = known_of(model)
    if detects(network):
        raise UsageError(
            f"a graph holds scores and the heatmap of whole images, and this {type(network).__name__} finds boxes; its "
            "weights can be exported, as .safetensors"
        )
    preprocess = preprocess or own
    size = image_shape(network) if preprocess is None else (preprocess.channels, *preprocess.input_size)
    with undisturbed(network) as bare:
        like = next(bare.parameters(), torch.zeros(()))
        noise = torch.randn(max(_BATCHES), *size, generator=torch.Generator().manual_seed(0)).to(like)
        graph = _graph(bare, method, noise[:1])
        about = {
            "method": graph.method,
            "preprocess": None if preprocess is None else dataclasses.asdict(preprocess),
            "class_names": list(class_names or own_names),
        }
        with _quiet():
            try:
                batch = torch.export.Dim("batch", max=1 << 24)  # a bound, or torch 2.6 asks whether it is 2⁶³ − 1
                program = torch.export.export(graph, (noise[:2],), dynamic_shapes=({0: batch},), strict=False)
                content = _WRITERS[suffix](program, json.dumps(about))
            except UsageError:
                raise
            except Exception as error:  # whatever a model does that no graph can hold
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise DataError(f"this {type(bare).__name__} with {graph.method} cannot be traced: {reason}") from error
            difference = _difference(graph, noise, content, suffix)
    if difference is not None and not difference <= _TOLERANCE:
        raise DataError(f"{os.fspath(out)} is not written: it gives other values than the model, by {difference:.2g}")
    write_file(out, content)
    return Exported(graph.method, size, difference)


def _graph(model: nn.Module, method: str | None, image_1CHW: Tensor) -> Graph:
    if method is not None and method not in METHODS:
        raise UsageError(f"there is no method {method!r}.{nearest(method, METHODS)} All: {', '.join(METHODS)}.")
    first = method or default_method(model, image_1CHW).name
    reasons = {first: f"{first} needs gradients, or looks at values to decide what to do, and a graph cannot"}
    fitting: list[str] = []
    for name in dict.fromkeys([first, *GRAPHS]):
        if name in GRAPHS:
            try:
                graph = GRAPHS[name](model, image_1CHW)
            except UsageError as error:
                reasons[name] = str(error).partition(" Methods that fit")[0].rstrip(".")
                continue
            if method in (None, name):
                return graph
            fitting.append(name)
    some = (
        f"methods that can be exported with it: {', '.join(fitting)}" if fitting else "no other method can be exported"
    )
    raise UsageError(f"{reasons[first]}; {some}")


def _difference(graph: Graph, noise: Tensor, content: bytes, suffix: str) -> float | None:
    """Between a file's outputs and the graph's, on some batches; None where nothing here runs it."""
    run = _RUNNERS[suffix](content)
    if run is None:
        return None
    largest = 0.0
    for count in _BATCHES:
        images = noise[-count:].contiguous()
        for ours, theirs in zip(graph(images), run(images), strict=True):
            apart = (ours.cpu().float() - theirs.cpu().float()).abs().max() / ours.abs().max().cpu().clamp(min=1)
            largest = max(largest, float(apart))
    return largest


def _program(program: torch.export.ExportedProgram, about: str) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={ENTRY: about})
    return buffer.getvalue()


def _onnx(program: torch.export.ExportedProgram, about: str) -> bytes:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"ONNX is written by the package {error.name}; install visionattn[onnx], or write a .pt2"
        ) from error
    made: Any = torch.onnx.export(
        program, (), dynamo=True, verbose=False, input_names=["images"], output_names=["scores", "heatmap"]
    )
    made.model.metadata_props[ENTRY] = about
    return made.model_proto.SerializeToString()


def _run_program(content: bytes) -> Any:
    return torch.export.load(io.BytesIO(content)).module()


def _run_onnx(content: bytes) -> Any:
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(np.asarray(out)) for out in session.run(None, {"images": images.cpu().numpy()})]

    return run


_WRITERS = {".onnx": _onnx, ".pt2": _program}
_RUNNERS = {".onnx": _run_onnx, ".pt2": _run_program}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say about themselves: deprecations between their own packages, and operators that they
    rewrite. What matters is checked on the values."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
