"""Drawing functions leave their inputs unchanged, and their error messages are one sentence."""

import numpy as np
import pytest

from tests.drawing.pictures import picture, ramp
from visionattn import drawing
from visionattn.drawing.sheets import Tile
from visionattn.errors import UsageError

DRAWERS = {
    "blend": drawing.blend,
    "contour": drawing.contour,
    "show_hottest": drawing.show_hottest,
    "side_by_side": drawing.side_by_side,
    "blend_seen": lambda image, heatmap: drawing.blend(image, heatmap, seen_HW=heatmap > 0.5),
    "draw_box": lambda image, heatmap: drawing.draw_box(image, (1, 1, 7, 6)),
    "draw_boxes": lambda image, heatmap: drawing.draw_boxes(image, [(1, 1, 7, 6)], labels=["cat"]),
    "sheet": lambda image, heatmap: drawing.sheet([Tile(image, ("cat",), True, (1, 1, 7, 6))]),
}


@pytest.mark.parametrize("name", DRAWERS)
@pytest.mark.parametrize("view", ["contiguous", "rotated", "mirrored", "every_other", "read_only", "column_major"])
def test_inputs_are_not_changed_in_any_memory_layout(name, view):
    image, heatmap = picture(26, 18), ramp(26, 18)
    image, heatmap = (
        {
            "contiguous": lambda a: a,
            "rotated": lambda a: np.rot90(a),
            "mirrored": lambda a: a[:, ::-1],
            "every_other": lambda a: a[::2, ::2],
            "read_only": lambda a: a,
            "column_major": np.asfortranarray,
        }[view](image),
        {"rotated": np.rot90, "mirrored": np.fliplr, "every_other": lambda a: a[::2, ::2]}.get(view, np.array)(heatmap),
    )
    if view == "read_only":
        image.flags.writeable = heatmap.flags.writeable = False
    before = image.copy(), heatmap.copy()
    out = DRAWERS[name](image, heatmap)
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(heatmap, before[1])
    assert out.dtype == np.uint8
    assert not np.shares_memory(out, image)
    np.testing.assert_array_equal(out, DRAWERS[name](*map(np.ascontiguousarray, before)))
    if name not in ("side_by_side", "sheet"):
        assert out.shape == image.shape


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: drawing.blend(picture(), np.zeros((9, 12))), "carry the heatmap"),
        (lambda: drawing.blend(picture().astype(float), ramp()), "uint8 RGB"),
        (lambda: drawing.blend(picture()[..., 0], ramp()), "uint8 RGB"),
        (lambda: drawing.blend(picture(), ramp(), alpha=1.5), r"alpha must be in \[0, 1\], got 1.5"),
        (lambda: drawing.blend(picture(), ramp(), saturation=-1), "saturation must be"),
        (lambda: drawing.blend(picture(), ramp(), colormap="virdis"), "Nearest: viridis"),
        (lambda: drawing.contour(picture(), np.zeros((2, 2))), "carry the heatmap"),
        (lambda: drawing.show_hottest(picture(), ramp(), fraction=0), r"in \(0, 1\], got 0"),
        (lambda: drawing.draw_boxes(picture(), [(0, 0, 3, 3)], labels=["a", "b"]), "2 labels for 1 boxes"),
        (lambda: drawing.sheet([]), "at least one picture"),
        (lambda: drawing.sheet([Tile(picture())], columns=0), "one column"),
        (lambda: drawing.side_by_side(picture(), np.zeros((2, 2))), "carry the heatmap"),
    ],
)
def test_errors_name_the_wrong_argument_in_one_sentence(call, words):
    with pytest.raises(UsageError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
