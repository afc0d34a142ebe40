"""What an export tells on the terminal: a bar while it runs, a short table at its end."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from visionattn.files import printable

_REASONS = 5  # failures that are told on the terminal; the manifest has all
_APART = 3  # images that are told where two models differ most


@dataclass
class Summary:
    """What a run has made.

    Attributes:
        out: the folder, as it was given.
        noun: what was made of each image.
        written: images of which all was made.
        failed: images without one.
        skipped: images whose overlay stood there already.
        blank: overlays of constant heatmaps, which show nothing.
        ignored: suffix → files of folders that are no images.
        links: linked folders that were not entered.
        failures: (file, reason) of the first failures.
        source: what is shown, as `gate of layer4.1`; "" if nothing was made.
        apart: (mean difference, file) of the images in which two compared models differ most, the farthest first.
        images: those that were found, videos apart.
        seconds: the whole run.
    """

    out: str
    noun: str = "overlay"
    written: int = 0
    failed: int = 0
    skipped: int = 0
    blank: int = 0
    ignored: Counter[str] = field(default_factory=Counter)
    links: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    source: str = ""
    apart: list[tuple[float, str]] = field(default_factory=list)
    images: Sequence[str] = ()
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """0, or 1 where some images failed."""
        return int(self.failed > 0)

    def count(self, entry: dict[str, Any], name: str) -> None:
        """Count the manifest's entry of one image."""
        if entry["status"] == "failed":
            self.failed += 1
            if len(self.failures) < _REASONS:
                self.failures.append((name, entry["reason"]))
            return
        self.written += 1
        self.blank += entry["peak"] is None
        self.source = self.source or entry["layer"]
        if "difference" in entry:
            self.apart = sorted([*self.apart, (entry["difference"]["mean"], name)], reverse=True)[:_APART]


class Bar:
    """`seen/ ━━━━━━━━━━━━━━━━━━━━ 212/214  34 images/s  2 failed`

    Args:
        console: where it is drawn.
        out: the folder of the run.
        total: images to do.
    """

    def __init__(self, console: Console, out: str, total: int) -> None:
        columns = TextColumn("  {task.description}", markup=False), BarColumn(20), TextColumn("{task.fields[state]}")
        self._progress = Progress(*columns, console=console, disable=total == 0)
        self._task = self._progress.add_task(_folder(out), total=total, state=f"0/{total}")
        self._total = total
        self._started = time.perf_counter()

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, sums: dict[str, int]) -> None:
        """Show sums of what is done, what failed of it, and how many frames of videos there are beside the images."""
        done, failed = sums.get("done", 0), sums.get("failed", 0)
        total = self._total + sums.get("frames", 0)
        seconds = time.perf_counter() - self._started
        rate = done / max(seconds, 1e-9)
        state = f"{done - failed}/{total}  {_number(rate)} images/s"
        if 0 < done < total:
            state += f"  {_duration((total - done) / rate)} left"
        if failed:
            state += f"  [red]{failed} failed[/red]"
        self._progress.update(self._task, completed=done, total=total, state=state)


def print_summary(console: Console, summary: Summary) -> None:
    """The lines at the end of a run."""
    folder, manifest = _folder(summary.out), _folder(summary.out) + "manifest.jsonl"
    pointing = f"pointing at: {printable(summary.source)}" if summary.source else ""
    rows: list[tuple[str, str, str, str]] = []
    if summary.written or not summary.skipped:
        rows.append((str(summary.written), summary.noun + "s" * (summary.written != 1), folder, pointing))
    if summary.skipped:
        rows.append((str(summary.skipped), "as before", "" if rows else folder, ""))
    if summary.blank:
        rows.append(
            (str(summary.blank), "blank", "", "the heatmap is constant and shows nothing; try another layer or target")
        )
    for place, (mean, name) in enumerate(summary.apart):
        rows.append(("", "most unlike" if place == 0 else "", "", f"{mean:.2f}  {printable(name)}"))
    for place, (name, reason) in enumerate(summary.failures):
        told = f"{printable(name)}: {printable(reason)}"
        rows.append((str(summary.failed), "failed", manifest, told) if place == 0 else ("", "", "", told))
    if summary.failed > len(summary.failures):
        rows.append(("", "", "", f"and {summary.failed - len(summary.failures)} more, in the manifest"))
    if summary.ignored:
        kinds = ", ".join(f"{count} {kind or 'without suffix'}" for kind, count in summary.ignored.most_common(4))
        rows.append((str(sum(summary.ignored.values())), "ignored", "", f"no images: {kinds}"))
    if summary.links:
        rows.append((str(summary.links), "not entered", "", "linked folders"))
    if not summary.failed:
        rows.append(("", "", manifest, ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, what, place_, told in rows:
        line = f"  {number:>{widths[0]}} {what:<{widths[1]}}   {place_:<{widths[2]}}   {told}".rstrip()
        console.print(Text(line, "red" if what == "failed" else ""), soft_wrap=True)


def _folder(out: str) -> str:
    return printable(out).rstrip("/\\") + "/"


def _number(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
