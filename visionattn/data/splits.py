"""Draw splits by a hash of file names, so that an image keeps its split when others are added or removed.

This file does not import torch.
"""

import hashlib
import unicodedata
from collections.abc import Sequence

from visionattn.errors import DataError


def draw_splits(names: Sequence[str], *, val: float, test: float, seed: int, where: str) -> dict[str, list[int]]:
    """Divide images into train, val and test.

    A hash of (seed, name) is a number in [0, 1). The image is a test image if the number is below `test`, a validation
    image if it is below `test` + `val`, and a training image otherwise. So the split of an image does not depend on the
    other images, and the sizes of the splits differ by chance from their fractions. If a split would be empty, it
    takes the one image whose number is nearest.

    Args:
        names: of the images, e.g. their paths in the folder of their class.
        val: fraction of validation images, in (0, 1).
        test: fraction of test images, in [0, 1); 0 gives no test images.
        seed: another seed gives other splits.
        where: what the images are, at the beginning of the error message.

    Returns:
        Split → indices into `names`, ascending; without `test` if its fraction is 0.

    Raises:
        DataError: there are fewer images than splits.
    """
    wanted = int(test > 0)
    if len(names) < wanted + 2:
        raise DataError(f"{where} has {len(names)} images, too few to split; add images, or a val split")
    numbers = [_number(seed, name) for name in names]
    order = sorted(range(len(names)), key=lambda index: (numbers[index], names[index]))
    first = min(max(sum(number < test for number in numbers), wanted), len(names) - 2)
    second = min(max(sum(number < test + val for number in numbers), first + 1), len(names) - 1)
    parts = {"train": order[second:], "val": order[first:second], "test": order[:first]}
    return {split: sorted(part) for split, part in parts.items() if part}


def check_fractions(val: float, test: float) -> None:
    """Check the fractions of validation and test images.

    Raises:
        ValueError: they leave nothing to train on, or no validation images.
    """
    if not (val > 0 and test >= 0 and val + test < 1):
        raise ValueError(f"val_fraction must be > 0, test_fraction ≥ 0 and their sum < 1, got {val} and {test}")


def _number(seed: int, name: str) -> float:
    """Return a number in [0, 1) that depends on the seed and the name."""
    text = f"{seed}/{unicodedata.normalize('NFC', name)}"  # macOS and Linux may store accents differently
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
