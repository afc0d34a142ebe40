"""Test the content of batches, and that the number of workers does not change batches."""

import torch

from visionattn.data import ClutteredDigitsData


def test_batch_has_boxes_masks_and_placements():
    data = ClutteredDigitsData(train_size=8, val_size=4, test_size=4, batch_size=4)
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    assert batch["box"].shape == (4, 4)
    assert batch["mask"].shape == (4, 64, 64)
    assert len(batch["placement"]) == len(batch["path"]) == 4
    assert -1 <= batch["image"].min() < batch["image"].max() <= 1


def test_batches_do_not_depend_on_workers():
    def epoch(num_workers):
        data = ClutteredDigitsData(train_size=12, batch_size=4, num_workers=num_workers)
        data.setup("fit")
        return torch.cat([batch["image"] for batch in data.train_dataloader()])

    assert torch.equal(epoch(0), epoch(2))
