"""Test building the data module of a config."""

import pytest
import torch

from tests.data.annotated import voc
from tests.refusals import refuses
from visionattn.data import ClutteredDigitsData
from visionattn.errors import UsageError
from visionattn.training import data_from_config

CONFIG = """
seed_everything: 3
trainer: {max_epochs: 1}
data:
  class_path: visionattn.data.ClutteredDigitsData
  init_args: {train_size: 6, val_size: 2, test_size: 3, num_workers: 0, batch_size: 2}
"""


def test_data_from_config_builds_the_configured_data_module(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(CONFIG)
    expected = ClutteredDigitsData(train_size=6, val_size=2, test_size=3, num_workers=0, batch_size=2)
    batches = []
    for data in (data_from_config(str(config)), expected):
        data.prepare_data()
        data.setup("test")
        batches.append(list(data.test_dataloader()))
    assert [len(batch["path"]) for batch in batches[0]] == [2, 1]
    for ours, theirs in zip(*batches, strict=True):
        assert ours["path"] == theirs["path"]
        assert torch.equal(ours["image"], theirs["image"])
        assert torch.equal(ours["label"], theirs["label"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer: {max_epochs: 1}", "has no data section"),
        ("data: {", "is not valid YAML"),
        (CONFIG.replace("batch_size", "batchsize"), "no option 'batchsize'.*Nearest: batch_size"),
    ],
)
def test_config_with_a_missing_or_wrong_data_section_is_refused(text, message, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(text)
    refuses(UsageError, message, lambda: data_from_config(str(config)))
    refuses(UsageError, r"there is no config .*nothing\.yaml", lambda: data_from_config(str(tmp_path / "nothing.yaml")))


def test_the_images_that_bad_boxes_drop_leaves_out_are_counted(tmp_path):
    """The command line silences warnings of jsonargparse, which calls the data module."""
    root = voc(tmp_path / "voc")
    (root / "JPEGImages" / "train_0.png").unlink()
    (root / "JPEGImages" / "train_1.png").write_bytes(b"no image")
    (tmp_path / "config.yaml").write_text(
        f"data: {{class_path: visionattn.data.AnnotatedData, init_args: {{root: {root}, bad_boxes: drop}}}}"
    )
    with pytest.warns(
        UserWarning, match="left out or clipped 1 missing image, 1 unreadable image; `visionattn data check"
    ):
        data_from_config(str(tmp_path / "config.yaml"))
