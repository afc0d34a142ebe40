"""The terminal output of an export: a progress bar while it runs and a short table at its end."""

import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from visionattn.files import printable
from visionattn.overlays.folder.manifest import Entry, Failed

_LINE = 60.0  # seconds between two lines of progress if the output is no terminal
_MAX_FAILURES = 5  # failures shown on the terminal; the manifest lists all
_MAX_DIFFERENT = 3  # images shown for a comparison: those in which the models differ most
_MAX_WARNINGS = 3  # kinds of warnings shown
_NUMBER = re.compile(r"\d[\d.]*")  # what differs between two warnings of one kind


@dataclass
class Summary:
    """The counts and failures of an export.

    Attributes:
        out: the output folder, as the user named it.
        noun: noun for one output in the summary, e.g. `overlay`.
        written: number of images with all outputs written.
        failed: number of images that failed.
        skipped: number of images with outputs of an earlier run that are up to date.
        blank: number of images with a constant heatmap, which shows nothing.
        ignored: suffix → number of files in the input folders that are not images.
        links: number of linked folders that were not entered.
        failures: (file, reason) of the first failures, at most five.
        source: method and source of the first heatmaps, e.g. `gradcam, layer4.1`; "" if no heatmap was made.
        warnings: messages of the methods' `MapWarning`s, except of constant heatmaps: the first of each kind, at most
            three.
        apart: (mean difference, file) of the images in which two models differ most, largest first, at most three.
        images: paths of all images, without videos.
        seconds: duration of the run.
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
    warnings: list[str] = field(default_factory=list)
    apart: list[tuple[float, str]] = field(default_factory=list)
    images: Sequence[str] = ()
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """1 if some images failed, else 0."""
        return int(self.failed > 0)

    def count(self, entry: Entry, name: str) -> None:
        """Add the manifest's entry of one image.

        Args:
            entry: the image's entry in the manifest.
            name: the image's name on the terminal.
        """
        if isinstance(entry, Failed):
            self.failed += 1
            if len(self.failures) < _MAX_FAILURES:
                self.failures.append((name, entry.reason))
            return
        self.written += 1
        self.blank += entry.facts["peak"] is None
        self.source = self.source or f"{entry.facts['method']}, {entry.facts['layer']}"
        if "difference" in entry.facts:
            different = sorted([*self.apart, (entry.facts["difference"]["mean"], name)], reverse=True)
            self.apart = different[:_MAX_DIFFERENT]

    def warn(self, message: str) -> None:
        """Add the message of a `MapWarning`, unless three are known or one of the same kind is."""
        kinds = [_NUMBER.sub("", known) for known in self.warnings]
        if _NUMBER.sub("", message) not in kinds and len(kinds) < _MAX_WARNINGS:
            self.warnings.append(message)


class ProgressBar:
    """A progress bar: `seen/ ━━━━━━━━━━━━━━━━━━━━ 212/214  34 images/s  2 failed`.

    If the output is no terminal, the same text without the bar is printed once a minute.

    Args:
        console: shows the bar.
        out: the output folder.
        total: number of images to export.
    """

    def __init__(self, console: Console, out: str, total: int) -> None:
        columns = TextColumn("  {task.description}", markup=False), BarColumn(20), TextColumn("{task.fields[state]}")
        self._progress = Progress(*columns, console=console, disable=total == 0)
        self._task = self._progress.add_task(_folder(out), total=total, state=f"0/{total}")
        self._total = total
        self._console, self._out = console, _folder(out)
        self._started = self._printed = time.perf_counter()

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, sums: dict[str, int]) -> None:
        """Show the sums of the counters.

        Args:
            sums: `done`, the number of finished images and frames, including failures; `failed`, the number of
                failures; `frames`, the number of video frames to export in addition to `total`.
        """
        done, failed = sums.get("done", 0), sums.get("failed", 0)
        total = self._total + sums.get("frames", 0)
        now = time.perf_counter()
        seconds = now - self._started
        rate = done / max(seconds, 1e-9)
        state = f"{done - failed}/{total}  {_number(rate)} images/s"
        if 0 < done < total:
            state += f"  {_duration((total - done) / rate)} left"
        if failed:
            state += f"  [red]{failed} failed[/red]"
        if not self._console.is_terminal and now - self._printed > _LINE:
            self._printed = now
            self._console.print(Text.from_markup(f"  {escape(self._out)} {state}"), soft_wrap=True)
        self._progress.update(self._task, completed=done, total=total, state=state)


def print_summary(console: Console, summary: Summary) -> None:
    """Print the table at the end of an export."""
    folder, manifest = _folder(summary.out), _folder(summary.out) + "manifest.jsonl"
    heatmaps = f"heatmaps: {printable(summary.source)}" if summary.source else ""
    rows: list[tuple[str, str, str, str]] = []
    if summary.written or not summary.skipped:
        rows.append((str(summary.written), summary.noun + "s" * (summary.written != 1), folder, heatmaps))
    if summary.skipped:
        rows.append((str(summary.skipped), "as before", "" if rows else folder, ""))
    if summary.blank:
        rows.append(
            (str(summary.blank), "blank", "", "the heatmap is constant and shows nothing; try another layer or target")
        )
    for warning in summary.warnings:
        rows.append(("", "warning", "", printable(warning)))
    for rank, (mean, name) in enumerate(summary.apart):
        rows.append(("", "most different" if rank == 0 else "", "", f"{mean:.2f}  {printable(name)}"))
    for rank, (name, reason) in enumerate(summary.failures):
        failure = f"{printable(name)}: {printable(reason)}"
        rows.append((str(summary.failed), "failed", manifest, failure) if rank == 0 else ("", "", "", failure))
    if summary.failed > len(summary.failures):
        rows.append(("", "", "", f"and {summary.failed - len(summary.failures)} more, in the manifest"))
    if summary.ignored:
        kinds = ", ".join(f"{count} {kind or 'without suffix'}" for kind, count in summary.ignored.most_common(4))
        rows.append((str(sum(summary.ignored.values())), "ignored", "", f"not images: {kinds}"))
    if summary.links:
        rows.append((str(summary.links), "not entered", "", "linked folders"))
    if not summary.failed:
        rows.append(("", "", manifest, ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, status, path, detail in rows:
        line = f"  {number:>{widths[0]}} {status:<{widths[1]}}   {path:<{widths[2]}}   {detail}".rstrip()
        console.print(Text(line, "red" if status == "failed" else ""), soft_wrap=True)


def _folder(out: str) -> str:
    return printable(out).rstrip("/\\") + "/"


def _number(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
