"""Every kind of output, against arithmetic on the carried heatmap."""

import io

import numpy as np
import pytest
from PIL import Image

from visionattn import drawing
from visionattn.data.placement import Placement, Preprocess
from visionattn.drawing.rendering import Style, heatmap_difference, render, render_difference
from visionattn.errors import UsageError
from visionattn.overlays.outputs import OUTPUTS, ExplainedImage, OutputScene, check_outputs, endings


def picture(height=40, width=60, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def look(image, name="gradcam", *, seed=1, fit="crop", size=32):
    _, placement = Preprocess(size, fit=fit)(image)
    heatmap = np.random.default_rng(seed).random((4, 4)).astype(np.float32)
    heatmap = (heatmap - heatmap.min()) / (heatmap.max() - heatmap.min())
    return ExplainedImage(name, "daisy 0.93", heatmap, heatmap * 3 - 1, placement)


def scene(*looks, image=None, style=None, **options):
    image = picture() if image is None else image
    return OutputScene(image, looks or [look(image)], style or Style(), **options)


def test_the_heatmap_has_16_bits_at_the_size_of_the_source():
    one = scene()
    carried = one.explanations[0].placement.carry(one.explanations[0].heatmap_hw)
    made = OUTPUTS["heatmap"].make(one)
    assert made.dtype == np.uint16
    np.testing.assert_allclose(made / 65535, carried, atol=0.51 / 65535)
    assert (made[:, :5] == 0).all()  # outside of the crop


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_the_mask_holds_the_hottest_share_and_the_spotlight_shows_it(share):
    one = scene(style=Style(top=share))
    carried = one.explanations[0].placement.carry(one.explanations[0].heatmap_hw)
    mask = OUTPUTS["mask"].make(one)
    assert set(np.unique(mask)) == {0, 255}
    assert (mask > 0).mean() == pytest.approx(share, abs=0.01)
    assert carried[mask > 0].min() >= carried[mask == 0].max()
    shown = OUTPUTS["spotlight"].make(one)
    np.testing.assert_array_equal(shown[mask > 0], one.picture[mask > 0])
    assert shown[mask == 0].max() <= 90  # dark


def test_arrays_put_the_heatmap_back_into_the_picture():
    first, second = look(picture()), look(picture(), "rollout", seed=2, fit="stretch")
    one = OUTPUTS["array"].make(scene(first))
    both = OUTPUTS["array"].make(scene(first, second))
    assert set(one) == {"heatmap", "raw", "matrix", "source_size", "input_size"}
    assert set(both) == {f"{name}/{key}" for name in ("gradcam", "rollout") for key in one}
    for key in one:
        np.testing.assert_array_equal(one[key], both[f"gradcam/{key}"])
    placement = Placement(both["rollout/matrix"], tuple(both["rollout/source_size"]), tuple(both["rollout/input_size"]))
    np.testing.assert_array_equal(placement.carry(both["rollout/heatmap"]), second.placement.carry(second.heatmap_hw))
    np.testing.assert_array_equal(both["rollout/raw"], second.raw_hw)


def test_an_overlay_is_the_rendered_picture_with_boxes_and_caption():
    plain = scene()
    expected = render(plain.picture, plain.explanations[0].heatmap_hw, plain.explanations[0].placement, plain.style)
    np.testing.assert_array_equal(OUTPUTS["overlay"].make(plain), expected)
    boxed = OUTPUTS["overlay"].make(scene(boxes=[[10, 10, 30, 30]], labels=["cat"]))
    changed = (boxed != expected).any(2)
    assert changed[10, 10:30].all()
    assert not changed[31:, :].any()
    captioned = OUTPUTS["overlay"].make(scene(style=Style(caption=True)))
    changed = (captioned != expected).any(2)
    assert changed[:13].any()
    assert not changed[14:].any()


def test_contours_are_the_style_s_lines_on_the_picture():
    one = scene(style=Style(contours=(0.3, 0.7)))
    carried = one.explanations[0].placement.carry(one.explanations[0].heatmap_hw)
    np.testing.assert_array_equal(
        OUTPUTS["contour"].make(one), drawing.contour(one.picture, carried, levels=(0.3, 0.7))
    )
    np.testing.assert_array_equal(
        OUTPUTS["contour"].make(scene()), drawing.contour(one.picture, carried, levels=(0.5,))
    )


def test_several_explanations_become_one_sheet():
    image = picture(400, 640)
    looks = [look(image, name, seed=seed) for seed, name in enumerate(("raw", "rollout", "gradcam@blocks.3"))]
    sheet = OUTPUTS["overlay"].make(scene(*looks, image=image))
    assert sheet.shape[1] > 4 * 320
    assert max(sheet.shape) < 2000  # however large the source is
    small = np.asarray(Image.fromarray(image).resize((320, 200), Image.Resampling.BOX))
    places = [np.abs(sheet[row : row + 200, column : column + 320].astype(int) - small).mean()
              for row in range(10, 22) for column in range(10, 22)]  # fmt: skip
    assert min(places) < 8  # the image comes first
    assert not np.array_equal(sheet, OUTPUTS["overlay"].make(scene(*looks[::-1], image=image)))


def test_boxes_lie_on_the_same_things_in_a_sheet():
    image = np.zeros((400, 800, 3), np.uint8)
    looks = [look(image, name) for name in ("a", "b")]
    box = [200, 100, 600, 300]
    with_box = OUTPUTS["contour"].make(scene(*looks, image=image, boxes=[box]))
    without = OUTPUTS["contour"].make(scene(*looks, image=image))
    rows, columns = np.nonzero((with_box != without).any(2))
    first = columns < 340
    assert (rows.max() - rows.min() + 1, columns[first].max() - columns[first].min() + 1) == (80, 160)


def difference_by_hand(first, second, height, width):
    return second.placement.carry(second.heatmap_hw) - first.placement.carry(first.heatmap_hw)


def test_the_difference_is_orange_where_the_second_is_hotter_and_blue_where_colder():
    image = np.full((40, 60, 3), 120, np.uint8)
    first, second = look(image, "a", fit="stretch"), look(image, "b", seed=5, fit="stretch", size=48)
    made = OUTPUTS["difference"].make(scene(first, second, image=image, compared=True)).astype(int)
    signed = difference_by_hand(first, second, 40, 60)
    warmth = made[..., 0] - made[..., 2]
    assert (warmth[signed > 0.05] > 0).all()
    assert (warmth[signed < -0.05] < 0).all()
    assert np.abs(warmth[np.abs(signed) < 0.003]).max(initial=0) < 25
    order = np.argsort(signed.ravel())
    assert (np.diff(warmth.ravel()[order]) >= -3).mean() > 0.97  # the farther apart, the more colour
    swapped = render_difference(image, second.heatmap_hw, second.placement, first.heatmap_hw, first.placement, Style())
    assert not np.array_equal(swapped, made)
    same = render_difference(image, first.heatmap_hw, first.placement, first.heatmap_hw, first.placement, Style())
    assert np.ptp(same, axis=2).max() == 0  # grey


def test_pixels_outside_of_either_input_are_dark_in_the_difference():
    image = np.full((40, 80, 3), 200, np.uint8)
    first, second = look(image, "a", fit="stretch"), look(image, "b", fit="crop")
    made = OUTPUTS["difference"].make(scene(first, second, image=image, compared=True))
    assert made[:, :18].max() < 80
    assert np.ptp(made[:, :18], axis=2).max() == 0
    assert made[:, 40].max() > 120


def test_heatmap_difference_is_the_mean_and_the_largest_point():
    image = picture(64, 96)
    first, second = look(image, "a", fit="stretch"), look(image, "b", seed=7, fit="letterbox")
    signed = difference_by_hand(first, second, 64, 96)
    mean, (x, y) = heatmap_difference((first.heatmap_hw, first.placement), (second.heatmap_hw, second.placement))
    assert mean == pytest.approx(np.abs(signed).mean(), abs=1e-5)
    assert np.abs(signed[int(y), int(x)]) == pytest.approx(np.abs(signed).max(), abs=1e-5)
    assert heatmap_difference((first.heatmap_hw, first.placement), (first.heatmap_hw, first.placement)) == (0.0, None)
    large = Preprocess(32, fit="stretch")(picture(1000, 1500))[1]
    mean, (x, y) = heatmap_difference((first.heatmap_hw, large), (second.heatmap_hw, large))
    whole = np.abs(large.carry(second.heatmap_hw) - large.carry(first.heatmap_hw))
    assert mean == pytest.approx(whole.mean(), abs=2e-3)
    assert whole[int(y), int(x)] > whole.max() - 0.04


def test_a_comparison_shows_both_and_their_difference():
    image = picture(300, 300)
    first, second = look(image, "old"), look(image, "new", seed=4)
    page = OUTPUTS["overlay"].make(scene(first, second, image=image, compared=True))
    assert page.shape[1] > 4 * 300
    panel = render(image, second.heatmap_hw, second.placement, Style())
    hits = [np.array_equal(page[12 : 12 + 300, x : x + 300], panel) for x in range(page.shape[1] - 300)]
    assert sum(hits) == 1


def test_every_kind_can_be_written_and_read_again(tmp_path):
    from visionattn.overlays.folder.image_export import encoded

    for kind, ending in endings(
        [kind for kind in OUTPUTS if kind not in ("difference", "gaze", "animation", "boxes")], ".png"
    ).items():
        made = OUTPUTS[kind].make(scene())
        content = io.BytesIO(encoded(made, "." + ending.rpartition(".")[2]))
        if ending.endswith(".npz"):
            read = dict(np.load(content, allow_pickle=False))
            assert {key: value.tolist() for key, value in read.items()} == {k: v.tolist() for k, v in made.items()}
        else:
            np.testing.assert_array_equal(np.asarray(Image.open(content)), made)


@pytest.mark.parametrize(
    ("kinds", "options", "words"),
    [
        ([], {}, "no kind of output is given; choose among overlay"),
        (["overlai"], {}, r"no kind 'overlai' to save.*Nearest: overlay\."),
        (["difference"], {}, "difference compares two models"),
        (["heatmap"], {"explanations": 3}, "heatmap holds one heatmap per image, got 3; save array"),
        (["side"], {"explanations": 2, "compared": True}, "side holds one heatmap"),
    ],
)
def test_kinds_that_cannot_be_made_are_refused(kinds, options, words):
    with pytest.raises(UsageError, match=words):
        check_outputs(kinds, **{"explanations": 1, "compared": False, **options})
