"""What attention costs on this machine: mechanisms, maps and overlays, each as a ratio to the same without.

Ratios are medians over rounds in which every row runs beside its baseline, so that a busy machine slows all alike. They
tell what to expect here; figures to publish want a quiet machine and `tests/benchmarks`.

Shapes: B images, C channels.
"""

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from visionattn import attention
from visionattn.data.decode import write_image
from visionattn.data.placement import Preprocess
from visionattn.errors import UsageError
from visionattn.maps.base import MapWarning, Method, unwrap
from visionattn.maps.choose import methods_that_fit
from visionattn.models.backbone import create_backbone, preprocess_of
from visionattn.overlay.export import export
from visionattn.overlay.views import View

MECHANISMS = (
    "SE",
    "ECA",
    "CoordinateAttention",
    "CBAM",
    "BAM",
    "SimAM",
    "TripletAttention",
    "FcaNet",
    "GlobalContext",
    "NonLocal",
)
"""Names in `attention`; built from a number of channels."""

SELF_ATTENTION: dict[str, Callable[[int], nn.Module]] = {
    "Windowed": partial(attention.Windowed, window=7),
    "Neighbourhood": partial(attention.Neighbourhood, size=7),
    "PooledKeys": partial(attention.PooledKeys, pool=2),
    "AdaptiveSpan": partial(attention.AdaptiveSpan, max_span=14),
}

_CHANNELS, _SIZE = 128, 28  # of the convolutions beside which a mechanism stands: a ResNet's second stage
_GRID, _HEADS, _HEAD_DIM = 32, 6, 64  # of the queries, keys and values of self-attention
_PHOTO = 480, 640
_SECONDS = 12  # of a group: on a slow machine there are fewer rounds


@dataclass(frozen=True)
class Group:
    """Rows of one baseline.

    Attributes:
        title: what is measured.
        baseline: what takes one unit of time.
        seconds: that unit.
        ratios: row → its time by that of the baseline.
    """

    title: str
    baseline: str
    seconds: float
    ratios: Mapping[str, float] = field(default_factory=dict)


def bench(
    model: str = "vit_small_patch16_224", *, batch_size: int = 2, rounds: int = 5, console: Console | None = None
) -> list[Group]:
    """Measure, and print tables as they are ready.

    Args:
        model: a timm model, with random weights, whose maps and overlays are measured.
        batch_size: images at once.
        rounds: of which the median is told; fewer where a group has taken 12 seconds.
        console: where the bar and the tables go; `Console(quiet=True)` for nowhere.

    Raises:
        UsageError: a number is below 1, or timm has no such model.
    """
    if batch_size < 1 or rounds < 1:
        raise UsageError(f"batch_size and rounds must be ≥ 1, got {batch_size} and {rounds}")
    console = console or Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    network = create_backbone(model).eval().to(device)
    preprocess = preprocess_of(network)
    columns = (TextColumn("  measuring {task.description}"), BarColumn(20), TextColumn("{task.percentage:>3.0f} %"))
    groups = []
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console, transient=True) as progress:
        for measure in (
            partial(_mechanisms, batch_size, device),
            partial(_self_attention, device),
            partial(_maps, network, preprocess, batch_size, device),
            partial(_overlays, network, preprocess, batch_size, device, Path(folder)),
        ):
            title, baseline, cases = measure()
            task = progress.add_task(title, total=(rounds + 1) * len(cases))
            groups.append(_measured(title, baseline, cases, rounds, device, partial(progress.advance, task)))
            progress.remove_task(task)
            progress.console.print(Text(f"  {title}", "bold"), _table(groups[-1]))
    cpu = f"CPU, threads: {torch.get_num_threads()}"
    console.print(f"  {torch.cuda.get_device_name() if device.type == 'cuda' else cpu}; torch {torch.__version__}")
    console.print(f"  {model}, batches of {batch_size}; ratios are medians of {rounds} rounds or fewer")
    return groups


Cases = tuple[str, str, dict[str, Callable[[], Any]]]


def _mechanisms(batch_size: int, device: torch.device) -> Cases:
    x_BCHW = torch.randn(batch_size, _CHANNELS, _SIZE, _SIZE, device=device)

    def case(mechanism: nn.Module | None) -> Callable[[], Any]:
        convolutions = [nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1) for _ in range(2)]
        block = nn.Sequential(*convolutions, *([] if mechanism is None else [mechanism])).to(device)
        return partial(_step, block, x_BCHW)

    cases = {name: case(getattr(attention, name)(_CHANNELS)) for name in MECHANISMS}
    title = f"mechanisms behind two convolutions of {_CHANNELS} × {_SIZE} × {_SIZE}, training"
    return title, "without", {"without": case(None), **cases}


def _step(block: nn.Module, x: Tensor) -> None:
    block.zero_grad(set_to_none=True)
    block(x).sum().backward()


def _self_attention(device: torch.device) -> Cases:
    shape = 1, _HEADS, _GRID**2, _HEAD_DIM
    qkv = [torch.randn(shape, device=device, requires_grad=True) for _ in range(3)]

    def case(mechanism: nn.Module) -> Callable[[], Any]:
        return lambda: mechanism(*qkv, grid=(_GRID, _GRID)).sum().backward()

    cases = {name: case(make(_HEADS).to(device)) for name, make in SELF_ATTENTION.items()}
    title = f"self-attention of {_GRID} × {_GRID} patches, {_HEADS} heads, training"
    return title, "Dense", {"Dense": case(attention.Dense(_HEADS).to(device)), **cases}


def _maps(network: nn.Module, preprocess: Preprocess, batch_size: int, device: torch.device) -> Cases:
    images_BCHW = torch.randn(batch_size, preprocess.channels, *preprocess.input_size, device=device)

    def plain() -> None:
        with torch.no_grad():
            network(images_BCHW)

    def case(method: Method) -> Callable[[], Any]:
        return lambda: method(network, images_BCHW)

    methods = methods_that_fit(unwrap(network), images_BCHW)
    return "heatmaps", "forward pass", {"forward pass": plain} | {name: case(one) for name, one in methods.items()}


def _overlays(network: nn.Module, preprocess: Preprocess, batch_size: int, device: torch.device, folder: Path) -> Cases:
    count = 4 * batch_size
    images_BCHW = torch.randn(batch_size, preprocess.channels, *preprocess.input_size, device=device)
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = random.integers(0, 256, (_PHOTO[0] // 16, _PHOTO[1] // 16, 3), dtype=np.uint8)
        write_image(folder / f"{number}.jpg", coarse.repeat(16, 0).repeat(16, 1))

    def plain() -> None:
        with torch.no_grad():
            for _ in range(count // batch_size):
                network(images_BCHW)

    def written() -> None:
        with tempfile.TemporaryDirectory() as out:
            view = View(network, preprocess)
            export([folder], out, view, batch_size=batch_size, console=Console(quiet=True))

    title = f"overlays of {count} photographs of {_PHOTO[1]} × {_PHOTO[0]}, from file to file"
    return title, "forward passes", {"forward passes": plain, "visionattn overlay": written}


def _measured(
    title: str,
    baseline: str,
    cases: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    advance: Callable[[], None],
) -> Group:
    times: dict[str, list[float]] = {name: [] for name in cases}
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MapWarning)  # of random weights
        for turn in range(rounds + 1):
            for name, run in cases.items():
                seconds = _timed(run, device)
                if turn:  # the first is to get warm
                    times[name].append(seconds)
                advance()
            if turn and time.perf_counter() - started > _SECONDS:
                break
    unit = times.pop(baseline)
    ratios = {name: statistics.median(t / u for t, u in zip(of, unit, strict=True)) for name, of in times.items()}
    return Group(title, baseline, statistics.median(unit), ratios)


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _table(group: Group) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(f"{group.baseline}: {1000 * group.seconds:,.{int(group.seconds < 0.1)}f} ms")
    table.add_column("time", justify="right")
    for name, ratio in group.ratios.items():
        table.add_row(name, f"{ratio:.2f}×")
    return table
