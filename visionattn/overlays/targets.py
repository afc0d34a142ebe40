"""Targets by name: the text of `--target`, or of `target` in Python, as the target of a method."""

from collections.abc import Sequence

import torch

from visionattn.data import read_image
from visionattn.errors import UsageError
from visionattn.maps import Against, Margin, Region, Similarity, Target
from visionattn.overlays.explainer import Explainer, targets_of

TARGETS = {
    "CLASS": "the score of a class, by its number or name",
    "not:CLASS": "what speaks against a class, also against the only output of a model with one",
    "margin:CLASS:CLASS": "the score of the first class minus that of the second",
    "region:CLASS": "of a segmentation network: the mean score over the pixels of a class",
    "like:FILE": "the similarity of the model's output to its output for another image",
}
"""Form of a target → its meaning."""


def targets_by_name(explainers: Sequence[Explainer], target: int | str | None) -> Sequence[Target]:
    """Return a target for each explainer.

    Raises:
        UsageError: as for `named_target`.
        DataError: as for `named_target`, or a number means different classes in two models.
    """
    kind, _, rest = target.partition(":") if isinstance(target, str) else ("", "", "")
    if isinstance(target, str) and kind in _KINDS:
        if kind != "like":
            for name in filter(None, rest.split(":", _KINDS[kind])):
                targets_of(explainers, name)  # the name must mean one class in all models
        return [named_target(explainer, target) for explainer in explainers]
    return targets_of(explainers, target)


def named_target(explainer: Explainer, text: str) -> Target:
    """Return the target that a text names; see `TARGETS`. The name of a class comes first.

    Args:
        explainer: the model, its preprocessing and its class names.
        text: the target.

    Raises:
        UsageError: the text has none of the forms.
        DataError: there is no such class, or the file cannot be read.
    """
    kind, _, rest = text.partition(":")
    if text in explainer.class_names or kind not in _KINDS:
        return explainer.target(text)
    if kind == "like":
        if not rest:
            raise _wrong(text)
        values, _ = explainer.preprocess(read_image(rest))
        (image_CHW,) = explainer.batch(torch.from_numpy(values)[None])
        return Similarity.to_image(explainer.model, image_CHW)
    splits = _KINDS[kind]
    names = rest.split(":", splits)
    if len(names) != splits + 1 or not all(names):
        raise _wrong(text)
    indices = [explainer.target(name) for name in names]
    first = indices[0]
    assert first is not None
    if kind == "not":
        return Against(first)
    if kind == "region":
        return Region(first)
    assert indices[1] is not None
    return Margin(first, indices[1])


_KINDS = {"not": 0, "margin": 1, "region": 0, "like": 0}  # form → number of colons after the first


def _wrong(text: str) -> UsageError:
    return UsageError(f"the target {text!r} is incomplete; write {', '.join(list(TARGETS)[:-1])} or like:FILE")
