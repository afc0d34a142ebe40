"""Batches in pinned memory, which are copied to a GPU while it computes."""

import pytest
import torch

from visionattn.data import ImageFolderData, Preprocess

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_pinned_and_their_copies_on_the_gpu_are_equal(workers, photo_folder, gpu):
    data = ImageFolderData(str(photo_folder), preprocess=Preprocess(32), batch_size=8, num_workers=workers)
    data.setup("fit")
    batches, copies = [], []
    busy = torch.randn(2000, 2000, device=gpu)
    for batch in data.train_dataloader():
        assert batch["image"].is_pinned()
        batches.append(batch["image"].clone())
        busy = (busy @ busy).clamp(-1, 1)  # keeps the GPU busy; the copy to it need not wait
        copies.append(batch["image"].to(gpu, non_blocking=True))
    for image, copy in zip(batches, copies, strict=True):
        assert torch.equal(image, copy.cpu())
