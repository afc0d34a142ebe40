"""Export a model with its heatmap as one file that runs without visionattn: ONNX or torch.export.

Shapes: B images, C channels, H × W pixels of the model's input, K outputs, h × w grid.
"""

import contextlib
import dataclasses
import importlib.util
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from visionattn.capture import undisturbed
from visionattn.data import Preprocess, image_shape
from visionattn.errors import DataError, UsageError, first_line, nearest
from visionattn.files import write_file
from visionattn.maps import GRAPHS, METHODS, Graph, default_method
from visionattn.overlays import describe_model, is_detector

ENTRY = "visionattn"
"""Key under which an exported file holds a JSON description: the method, the preprocessing and the class names."""

_TOLERANCE = 1e-4  # largest difference allowed between the file's outputs and the model's
_BATCHES = 1, 3  # batch sizes of the check; the graph is traced with 2

_Runner: TypeAlias = Callable[[Tensor], Sequence[Tensor]]
"""Runs a file: images (B, C, H, W) → scores (B, K) and heatmap (B, h, w)."""


@dataclass(frozen=True)
class Exported:
    """Describes an exported file.

    Attributes:
        method: name of the heatmap's method.
        input_size: (C, H, W) of one image; the batch size is free.
        difference: largest difference between the file's outputs and the model's, on random images, divided by the
            model's largest output if that is above 1. None if onnxruntime is not installed.
    """

    method: str
    input_size: tuple[int, int, int]
    difference: float | None


def check_suffix(out: str | os.PathLike[str]) -> None:
    """Check that a graph can be written to a path, without reading a model.

    Raises:
        UsageError: the suffix is neither .onnx nor .pt2, or a package that writes ONNX is missing.
    """
    suffix = Path(out).suffix
    if suffix not in _WRITERS:
        raise UsageError(f"a graph must be written as {' or '.join(_WRITERS)}, got {os.fspath(out)}")
    for package in ("onnx", "onnxscript") if suffix == ".onnx" else ():
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"writing ONNX needs the package {package}; install visionattn[onnx], or write a .pt2")


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

    The graph takes any number of preprocessed images; each heatmap is in [0, 1] and spans its image. The file also
    holds the method, the preprocessing and the class names as JSON: in ONNX as the metadata entry `visionattn`, in a
    .pt2 as the extra file `visionattn`. README of training/ says how to prepare images with it.

    Args:
        model: any vision model, or a task that `visionattn.load` returned; it is left unchanged.
        out: path of the file: .onnx, or .pt2 for `torch.export.load`.
        method: raw, rollout, gate or gradcam. Default: the method that `maps.default_method` chooses, if it is one of
            these four; else the first of the four that fits. A graph computes no gradients. So gradcam fits only models
            whose linear head follows a mean over positions, where the gradients are the head's weights.
        preprocess: the preprocessing of images. Default: that of the timm or torchvision model, or of the task.
        class_names: names of the outputs. Default: those of the timm model or the task.

    Returns:
        The method, the image size and the largest difference between the file and the model.

    Raises:
        UsageError: the suffix is neither .onnx nor .pt2, a package that writes ONNX is missing, the model is a
            detector, or the method does not fit the model.
        DataError: the model cannot be traced, the file's values differ from the model's, or the file cannot be written.
    """
    check_suffix(out)
    suffix = Path(out).suffix
    network, own, own_names = describe_model(model)
    if is_detector(network):
        raise UsageError(
            f"a graph computes scores and heatmaps of whole images, but this {type(network).__name__} finds boxes; "
            "export its weights as .safetensors"
        )
    preprocess = preprocess or own
    size = image_shape(network) if preprocess is None else (preprocess.channels, *preprocess.input_size)
    with undisturbed(network) as bare:
        like = next(bare.parameters(), torch.zeros(()))
        noise = torch.randn(max(_BATCHES), *size, generator=torch.Generator().manual_seed(0)).to(like)
        graph = _graph(bare, method, noise[:1])
        description = {
            "method": graph.method,
            "preprocess": None if preprocess is None else _steps(preprocess),
            "class_names": list(class_names or own_names),
        }
        with _quiet():
            try:
                # without `max`, torch 2.6 would compare the number of images with 2⁶³ − 1
                batch = torch.export.Dim("batch", max=1 << 24)
                program = torch.export.export(graph, (noise[:2],), dynamic_shapes=({0: batch},), strict=False)
            except Exception as error:  # torch.export raises many types of errors for unsupported models
                name = f"this {type(bare).__name__} with {graph.method}"
                raise DataError(f"{name} cannot be traced: {first_line(error)}") from error
            try:
                content = _WRITERS[suffix](program, json.dumps(description))
            except Exception as error:  # as above; the exporter of torch 2.6 fails with current releases of onnx-ir
                raise DataError(
                    f"torch {torch.__version__} cannot write this {type(bare).__name__} as {suffix} "
                    f"({first_line(error)}); install newer releases of torch and onnxscript, or write another format"
                ) from error
            difference = _difference(graph, noise, content, suffix)
    if difference is not None and not difference <= _TOLERANCE:
        raise DataError(
            f"{os.fspath(out)} is not written, because its outputs differ from the model's by up to {difference:.2g}; "
            f"the limit is {_TOLERANCE:g}"
        )
    write_file(out, content)
    return Exported(graph.method, size, difference)


def _steps(preprocess: Preprocess) -> dict[str, object]:
    """Return a preprocessing as plain data, with the sizes that follow from it."""
    sizes = {"input_size": preprocess.input_size, "frame": preprocess.frame}
    return dataclasses.asdict(preprocess) | sizes


def _graph(model: nn.Module, method: str | None, image_1CHW: Tensor) -> Graph:
    """Build the graph of a method, or of the first method that fits.

    Raises:
        UsageError: the method does not fit the model, or no method fits. The message names the methods that fit.
    """
    if method is not None and method not in METHODS:
        raise UsageError(f"there is no method {method!r}.{nearest(method, METHODS)} All: {', '.join(METHODS)}.")
    first = method or default_method(model, image_1CHW).name
    reasons = {first: f"{first} needs gradients or branches on values, and a graph supports neither"}
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
    others = (
        f"methods that fit this model in a graph: {', '.join(fitting)}"
        if fitting
        else "no other method can be exported"
    )
    raise UsageError(f"{reasons[first]}; {others}")


def _difference(graph: Graph, noise: Tensor, content: bytes, suffix: str) -> float | None:
    """Return the largest difference between a file's outputs and the graph's, or None if the file cannot be run."""
    run = _RUNNERS[suffix](content)
    if run is None:
        return None
    largest = 0.0
    for count in _BATCHES:
        images = noise[-count:].contiguous()
        for ours, theirs in zip(graph(images), run(images), strict=True):
            error = (ours.cpu().float() - theirs.cpu().float()).abs().max() / ours.abs().max().cpu().clamp(min=1)
            largest = max(largest, float(error))
    return largest


def _program(program: torch.export.ExportedProgram, description: str) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={ENTRY: description})
    return buffer.getvalue()


def _onnx(program: torch.export.ExportedProgram, description: str) -> bytes:
    exported = torch.onnx.export(
        program, (), dynamo=True, verbose=False, input_names=["images"], output_names=["scores", "heatmap"]
    )
    assert exported is not None  # torch returns None only for an export by tracing
    exported.model.metadata_props[ENTRY] = description
    return bytes(exported.model_proto.SerializeToString())


def _run_program(content: bytes) -> _Runner | None:
    return torch.export.load(io.BytesIO(content)).module()


def _run_onnx(content: bytes) -> _Runner | None:
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
    """Silence the exporters' deprecation warnings and notes on operators; `_difference` still finds wrong values."""
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
