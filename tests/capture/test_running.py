"""If a model cannot run or be captured, the error names the input that the model needs."""

import subprocess
import sys

import pytest
import torch

from tests.capture import models
from tests.refusals import refuses
from visionattn.capture import capture
from visionattn.errors import UsageError
from visionattn.maps import METHODS, GradCAM, RawAttention


@pytest.mark.parametrize("convert", [torch.jit.script, lambda model: torch.jit.trace(model, models.pictures())])
@pytest.mark.filterwarnings("ignore")
def test_capture_of_scripted_and_traced_models_is_an_error(convert):
    scripted = convert(models.vit(depth=1))
    message = "a scripted or traced model cannot be watched; pass the model it was made from"
    for watch in (lambda: capture(scripted), lambda: RawAttention()(scripted, models.pictures())):
        refuses(UsageError, message, watch)


@pytest.mark.parametrize("name", ["raw", "rollout", "chefer", "gradcam", "scorecam"])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 48, 48), r"wants images of 3×64×64 and got 3×48×48 \(.*\); resize them, .* or .* img_size=\(48, 48\)"),
        ((2, 3, 70, 64), "wants images of 3×64×64 and got 3×70×64"),
        ((2, 1, 64, 64), r"wants images of 3×64×64 and got 1×64×64 \(.*\); give them 3 channels .* mean and std"),
    ],
)
def test_images_of_a_wrong_size_are_an_error_that_names_the_right_size(name, shape, message):
    refuses(UsageError, message, lambda: METHODS[name]()(models.vit(), torch.randn(shape)))


def test_the_error_names_the_image_size_of_torchvision_models():
    with pytest.raises(UsageError, match="wants images of 64×64 and got 48×48"):
        GradCAM()(models.torchvision_vit(), models.pictures(48))


COUNT_FAULTS = """
import ctypes, resource, sys
from visionattn.capture import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def rounds(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        block = libc.malloc(48 << 20)
        libc.memset(block, 1, 48 << 20)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
rounds(1)
print(rounds(10))
"""


def test_a_block_of_the_same_size_costs_no_page_faults():
    default, kept = (
        int(subprocess.run([sys.executable, "-c", COUNT_FAULTS, mode], check=True, capture_output=True).stdout)
        for mode in ("default", "keep")
    )
    assert default >= 10 * 24  # 48 MB in huge pages of 2 MB, the smallest possible number of faults
    assert kept < default / 10
