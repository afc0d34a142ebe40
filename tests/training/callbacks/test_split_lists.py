"""Test that the lists of the splits are written, and that another run can use them."""

from types import SimpleNamespace

from tests.data.annotated import voc
from visionattn.data import AnnotatedData, ClutteredDigitsData
from visionattn.training.callbacks.split_lists import WriteSplits


def write(data, folder):
    """Write the lists as a training does, and return the names of the files."""
    WriteSplits(folder).on_train_start(SimpleNamespace(datamodule=data, is_global_zero=True), None)
    return sorted(file.name for file in folder.iterdir()) if folder.exists() else []


def test_the_lists_give_another_run_the_same_splits(tmp_path):
    root = voc(tmp_path / "voc")
    for file in (root / "ImageSets" / "Main").iterdir():
        file.unlink()
    drawn = AnnotatedData(str(root), val_fraction=0.3, test_fraction=0.3, num_workers=0)
    lists = tmp_path / "splits"
    assert write(drawn, lists) == ["test.txt", "train.txt", "val.txt"]
    lines = [line for file in lists.iterdir() for line in file.read_text().splitlines()]
    assert sorted(lines) == sorted(f"JPEGImages/{file.name}" for file in (root / "JPEGImages").iterdir())
    splits = {split: str(lists / f"{split}.txt") for split in ("train", "val", "test")}
    again = AnnotatedData(str(root), splits=splits, num_workers=0)
    for split in splits:
        assert again.listing(split) == drawn.listing(split)


def test_no_lists_are_written_for_images_that_are_drawn(tmp_path):
    data = ClutteredDigitsData(train_size=8, val_size=4, test_size=4)
    assert write(data, tmp_path / "splits") == []
