"""Upload a model to the Hugging Face hub: weights as safetensors, a description as JSON, and a model card."""

import csv
import io
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visionattn.errors import DataError, UsageError, first_line
from visionattn.files import write_file
from visionattn.tasks import CHECKPOINT_ENTRY
from visionattn.training.hub import PREFIX, WEIGHTS, _check_name

_TASKS = {
    "Classification": "image-classification",
    "GlimpseClassification": "image-classification",
    "Detection": "object-detection",
}
"""Class of the task → name of the task on the hub."""


def push(
    path: str | os.PathLike[str],
    repo: str,
    *,
    picture: str | os.PathLike[str] | None = None,
    private: bool = True,
    token: str | None = None,
) -> str:
    """Upload the model of a checkpoint to the hub.

    Args:
        path: a .ckpt of a run, or a .safetensors written by `visionattn export`. If its folder has a `test.csv`, the
            model card shows these results.
        repo: `owner/name`; the repository is created if it does not exist.
        picture: an image, whose overlay the card shows (default: the card shows the run's `overlays/test.png`).
        private: whether a newly created repository is private.
        token: access token of the hub (default: the token of `hf auth login`).

    Returns:
        The URL of the repository.

    Raises:
        UsageError: the name is malformed, or there is no picture for the card.
        DataError: the checkpoint or the picture cannot be read, or the upload fails.
    """
    _check_name(repo)
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        write_folder(path, folder, repo, picture=picture)
        try:
            address = api.create_repo(repo_id=repo, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message="visionattn push")
        except Exception as error:  # the hub's client raises many kinds of exceptions
            raise DataError(f"{repo} cannot be uploaded to the hub: {first_line(error)}") from error
    return str(address)


def write_folder(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    repo: str,
    *,
    picture: str | os.PathLike[str] | None = None,
) -> None:
    """Write the files that `push` uploads: `model.safetensors`, `config.json`, `README.md` and `overlay.png`.

    Args:
        path, picture: see `push`.
        folder: an existing folder.
        repo: name of the repository, which the card shows.

    Raises:
        UsageError, DataError: see `push`.
    """
    from visionattn.training import checkpoints

    out, run = Path(folder), Path(path).parent
    checkpoints.export(path, out / WEIGHTS)
    entry = checkpoints.read(out / WEIGHTS)[CHECKPOINT_ENTRY]
    write_file(out / "config.json", json.dumps(entry, indent=2).encode())
    write_file(out / "overlay.png", _overlay(out / WEIGHTS, run, picture))
    write_file(out / "README.md", _card(entry, repo, _results(run / "test.csv")).encode())


def _overlay(weights: Path, run: Path, picture: str | os.PathLike[str] | None) -> bytes:
    own = run / "overlays" / "test.png"
    if picture is None:
        if not own.is_file():
            raise UsageError(
                f"the card needs an overlay, but there is no {own}; test the run, or give a picture to overlay"
            )
        return own.read_bytes()
    from visionattn.overlays import overlay
    from visionattn.training import checkpoints

    buffer = io.BytesIO()
    overlay(checkpoints.load(weights), picture, caption=True).save(buffer, "PNG")
    return buffer.getvalue()


def _results(path: Path) -> list[tuple[str, float]]:
    """Return (metric, value) of each row of a test.csv, or an empty list if the file does not exist."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [(name, float(value)) for name, value in list(csv.reader(file))[1:]]


def _card(entry: Mapping[str, Any], repo: str, results: Sequence[tuple[str, float]]) -> str:
    task = str(entry["model"]["class_path"]).rpartition(".")[2]
    front = ["library_name: visionattn", "tags: [visionattn, attention, interpretability]"]
    if task in _TASKS:
        front.append(f"pipeline_tag: {_TASKS[task]}")
    title = repo.rpartition("/")[2]
    names = [_plain(name) for name in entry["class_names"]]
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    lines = ["---", *front, "---", "", f"# {title}", "", f"{_network(entry)}, trained with visionattn."]
    lines += [f"The model has {len(names)} classes: {shown}."] if names else []
    lines += ["", "![overlay of a heatmap](overlay.png)", ""]
    if results:
        lines += ["| metric on the test images | value |", "|---|---|"]
        lines += [f"| {_plain(name)} | {value:.4g} |" for name, value in results] + [""]
    lines += [
        "```python",
        "import visionattn as va",
        "",
        f'task = va.load("{PREFIX}{repo}")',
        'va.overlay(task, "photo.jpg")',
        "```",
        "",
        f"    visionattn overlay --images photos --out seen --ckpt {PREFIX}{repo}",
        "",
        "`config.json` has the options of the network and of the preprocessing.",
    ]
    return "\n".join(lines) + "\n"


def _network(entry: Mapping[str, Any]) -> str:
    network = entry["model"].get("init_args", {}).get("network", {})
    kind = str(network.get("class_path", "a network")).rpartition(".")[2]
    args = network.get("init_args", {})
    backbone = args.get("backbone") or (args.get("features") or {}).get("backbone")
    mechanism = args.get("attention")
    mechanism = mechanism.get("class_path") if isinstance(mechanism, Mapping) else mechanism
    words = f"`{_plain(kind)}`"
    words += f" on `{_plain(backbone)}`" if isinstance(backbone, str) else ""
    return words + (f" with `{_plain(str(mechanism).rpartition('.')[2])}`" if mechanism else "")


def _plain(text: str) -> str:
    """Replace the characters that have a meaning in Markdown by spaces."""
    return re.sub(r"[^\w .,:;()/+@%-]", " ", str(text))
