"""Every kind of output matches arithmetic on the heatmap carried to the source."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from tests.overlays import golden
from visionattn import drawing
from visionattn.data.placement import Placement, Preprocess
from visionattn.drawing import Style, heatmap_difference, render, render_difference
from visionattn.errors import UsageError
from visionattn.overlays.outputs import OUTPUTS, ExplainedImage, OutputScene, check_outputs, endings

DRAWN = ("nearest", "linear", "smooth")


def picture(height=40, width=60, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def explanation(image, name="gradcam", *, seed=1, fit="crop", size=32):
    _, placement = Preprocess(size, fit=fit)(image)
    heatmap = np.random.default_rng(seed).random((4, 4)).astype(np.float32)
    heatmap = (heatmap - heatmap.min()) / (heatmap.max() - heatmap.min())
    return ExplainedImage(name, "daisy 0.93", heatmap, heatmap * 3 - 1, placement)


def scene(*explanations, image=None, style=None, **options):
    image = picture() if image is None else image
    return OutputScene(image, explanations or [explanation(image)], style or Style(), **options)


def test_the_heatmap_has_16_bits_at_the_size_of_the_source():
    single = scene()
    carried = single.explanations[0].placement.carry(single.explanations[0].heatmap_hw)
    drawn = OUTPUTS["heatmap"].make(single)
    assert drawn.dtype == np.uint16
    np.testing.assert_allclose(drawn / 65535, carried, atol=0.51 / 65535)
    assert (drawn[:, :5] == 0).all()  # outside of the crop


@pytest.mark.parametrize("kind", ["heatmap", "array"])
def test_values_do_not_depend_on_how_heat_is_drawn(kind):
    first, *others = (golden.as_picture(OUTPUTS[kind].make(scene(style=Style(interpolation=each)))) for each in DRAWN)
    for other in others:
        np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize("kind", ["overlay", "contour", "spotlight", "side", "mask", "boxes", "difference"])
def test_every_picture_of_a_heatmap_follows_the_interpolation(kind):
    pictures = [golden.outputs(Style(interpolation=each))[kind] for each in DRAWN]
    for first, second in itertools.combinations(pictures, 2):
        assert not np.array_equal(first, second)


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
def test_the_mask_and_the_spotlight_select_the_hottest_fraction(fraction):
    single = scene(style=Style(top=fraction))
    carried = single.explanations[0].placement.carry(single.explanations[0].heatmap_hw, "smooth")
    mask = OUTPUTS["mask"].make(single)
    assert set(np.unique(mask)) == {0, 255}
    assert (mask > 0).mean() == pytest.approx(fraction, abs=0.01)
    assert carried[mask > 0].min() >= carried[mask == 0].max()
    shown = OUTPUTS["spotlight"].make(single)
    np.testing.assert_array_equal(shown[mask > 0], single.picture[mask > 0])
    assert shown[mask == 0].max() <= 90  # dark


def test_arrays_hold_the_heatmap_and_its_placement():
    first, second = explanation(picture()), explanation(picture(), "rollout", seed=2, fit="stretch")
    single = OUTPUTS["array"].make(scene(first))
    both = OUTPUTS["array"].make(scene(first, second))
    assert set(single) == {"heatmap", "raw", "matrix", "source_size", "input_size"}
    assert set(both) == {f"{name}/{key}" for name in ("gradcam", "rollout") for key in single}
    for key in single:
        np.testing.assert_array_equal(single[key], both[f"gradcam/{key}"])
    placement = Placement(both["rollout/matrix"], tuple(both["rollout/source_size"]), tuple(both["rollout/input_size"]))
    np.testing.assert_array_equal(placement.carry(both["rollout/heatmap"]), second.placement.carry(second.heatmap_hw))
    np.testing.assert_array_equal(both["rollout/raw"], second.raw_hw)


def test_an_overlay_is_the_rendered_heatmap_with_boxes_and_caption():
    single = scene()
    (explained,) = single.explanations
    expected = render(single.picture, explained.heatmap_hw, explained.placement, single.style)
    np.testing.assert_array_equal(OUTPUTS["overlay"].make(single), expected)
    boxed = OUTPUTS["overlay"].make(scene(boxes=[[10, 10, 30, 30]], labels=["cat"]))
    changed = (boxed != expected).any(2)
    assert changed[10, 10:30].all()
    assert not changed[31:, :].any()
    captioned = OUTPUTS["overlay"].make(scene(style=Style(caption=True)))
    changed = (captioned != expected).any(2)
    assert changed[:13].any()
    assert not changed[14:].any()


def test_contours_are_drawn_at_the_levels_of_the_style_or_at_one_half():
    single = scene(style=Style(contours=(0.3, 0.7)))
    carried = single.explanations[0].placement.carry(single.explanations[0].heatmap_hw, "smooth")
    np.testing.assert_array_equal(
        OUTPUTS["contour"].make(single), drawing.contour(single.picture, carried, levels=(0.3, 0.7))
    )
    np.testing.assert_array_equal(
        OUTPUTS["contour"].make(scene()), drawing.contour(single.picture, carried, levels=(0.5,))
    )


def test_several_explanations_become_one_sheet():
    image = picture(400, 640)
    explanations = [
        explanation(image, name, seed=seed) for seed, name in enumerate(("raw", "rollout", "gradcam@blocks.3"))
    ]
    sheet = OUTPUTS["overlay"].make(scene(*explanations, image=image))
    assert sheet.shape[1] > 4 * 320
    assert max(sheet.shape) < 2000  # tiles have at most 320 pixels a side
    small = np.asarray(Image.fromarray(image).resize((320, 200), Image.Resampling.BOX))
    distances = [np.abs(sheet[row : row + 200, column : column + 320].astype(int) - small).mean()
              for row in range(10, 22) for column in range(10, 22)]  # fmt: skip
    assert min(distances) < 8  # the first tile is the image
    assert not np.array_equal(sheet, OUTPUTS["overlay"].make(scene(*explanations[::-1], image=image)))


def test_boxes_are_scaled_with_the_pictures_of_a_sheet():
    image = np.zeros((400, 800, 3), np.uint8)
    explanations = [explanation(image, name) for name in ("a", "b")]
    box = [200, 100, 600, 300]
    with_box = OUTPUTS["contour"].make(scene(*explanations, image=image, boxes=[box]))
    without = OUTPUTS["contour"].make(scene(*explanations, image=image))
    rows, columns = np.nonzero((with_box != without).any(2))
    first = columns < 340
    assert (rows.max() - rows.min() + 1, columns[first].max() - columns[first].min() + 1) == (80, 160)


def difference_by_hand(first, second, interpolation="linear"):
    carried = [each.placement.carry(each.heatmap_hw, interpolation) for each in (first, second)]
    return carried[1] - carried[0]


def test_the_difference_is_orange_where_the_second_is_hotter_and_blue_where_colder():
    image = np.full((40, 60, 3), 120, np.uint8)
    first, second = explanation(image, "a", fit="stretch"), explanation(image, "b", seed=5, fit="stretch", size=48)
    drawn = OUTPUTS["difference"].make(scene(first, second, image=image, compared=True)).astype(int)
    signed = difference_by_hand(first, second, "smooth")
    warmth = drawn[..., 0] - drawn[..., 2]  # red minus blue
    assert (warmth[signed > 0.05] > 0).all()
    assert (warmth[signed < -0.05] < 0).all()
    assert np.abs(warmth[np.abs(signed) < 0.003]).max(initial=0) < 25
    order = np.argsort(signed.ravel())
    assert (np.diff(warmth.ravel()[order]) >= -3).mean() > 0.97  # warmth rises with the difference
    swapped = render_difference(image, second.heatmap_hw, second.placement, first.heatmap_hw, first.placement, Style())
    assert not np.array_equal(swapped, drawn)
    same = render_difference(image, first.heatmap_hw, first.placement, first.heatmap_hw, first.placement, Style())
    assert np.ptp(same, axis=2).max() == 0  # grey


def test_pixels_outside_of_either_input_are_dark_in_the_difference():
    image = np.full((40, 80, 3), 200, np.uint8)
    first, second = explanation(image, "a", fit="stretch"), explanation(image, "b", fit="crop")
    drawn = OUTPUTS["difference"].make(scene(first, second, image=image, compared=True))
    assert drawn[:, :18].max() < 80
    assert np.ptp(drawn[:, :18], axis=2).max() == 0
    assert drawn[:, 40].max() > 120


def test_heatmap_difference_returns_the_mean_and_the_point_of_the_largest_difference():
    image = picture(64, 96)
    first, second = explanation(image, "a", fit="stretch"), explanation(image, "b", seed=7, fit="letterbox")
    signed = difference_by_hand(first, second)
    mean, (x, y) = heatmap_difference((first.heatmap_hw, first.placement), (second.heatmap_hw, second.placement))
    assert mean == pytest.approx(np.abs(signed).mean(), abs=1e-5)
    assert np.abs(signed[int(y), int(x)]) == pytest.approx(np.abs(signed).max(), abs=1e-5)
    assert heatmap_difference((first.heatmap_hw, first.placement), (first.heatmap_hw, first.placement)) == (0.0, None)
    large = Preprocess(32, fit="stretch")(picture(1000, 1500))[1]
    mean, (x, y) = heatmap_difference((first.heatmap_hw, large), (second.heatmap_hw, large))
    whole = np.abs(large.carry(second.heatmap_hw) - large.carry(first.heatmap_hw))
    assert mean == pytest.approx(whole.mean(), abs=2e-3)
    assert whole[int(y), int(x)] > whole.max() - 0.04


def test_a_comparison_has_four_panels_and_shows_the_overlay_of_the_second_model():
    image = picture(300, 300)
    first, second = explanation(image, "old"), explanation(image, "new", seed=4)
    page = OUTPUTS["overlay"].make(scene(first, second, image=image, compared=True))
    assert page.shape[1] > 4 * 300
    panel = render(image, second.heatmap_hw, second.placement, Style())
    hits = [np.array_equal(page[12 : 12 + 300, x : x + 300], panel) for x in range(page.shape[1] - 300)]
    assert sum(hits) == 1


def test_encoded_outputs_are_decoded_without_loss(tmp_path):
    from visionattn.overlays.folder.image_export import encoded

    for kind, ending in endings(
        [kind for kind in OUTPUTS if kind not in ("difference", "gaze", "animation", "boxes")], ".png"
    ).items():
        drawn = OUTPUTS[kind].make(scene())
        content = io.BytesIO(encoded(drawn, "." + ending.rpartition(".")[2]))
        if ending.endswith(".npz"):
            read = dict(np.load(content, allow_pickle=False))
            assert {key: value.tolist() for key, value in read.items()} == {k: v.tolist() for k, v in drawn.items()}
        else:
            np.testing.assert_array_equal(np.asarray(Image.open(content)), drawn)


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
def test_kinds_that_do_not_fit_the_explanations_are_refused(kinds, options, words):
    with pytest.raises(UsageError, match=words):
        check_outputs(kinds, **{"explanations": 1, "compared": False, **options})


def test_outputs_match_the_golden_image():
    assert golden.FILE.stat().st_size < 60_000
    changed = golden.differences(golden.outputs())
    assert not changed, (
        f"the outputs differ from the golden image ({'; '.join(changed)}): if an existing output has changed, raise "
        "VERSION in overlays/outputs.py, so that earlier outputs are made again; then write the golden image again "
        "with python -m tests.overlays.golden"
    )


def test_dashed_boxes_differ_from_the_golden_image(monkeypatch):
    from visionattn.drawing import draw_boxes
    from visionattn.overlays import outputs

    def draw_dashed(picture_HWC, boxes, **options):
        drawn, dash = draw_boxes(picture_HWC, boxes, **options), np.indices(picture_HWC.shape[:2]).sum(0) // 6 % 2 > 0
        return np.where(dash[..., None], drawn, picture_HWC)

    monkeypatch.setattr(outputs, "draw_boxes", draw_dashed)
    assert [line for line in golden.differences(golden.outputs()) if line.startswith("overlay:")]


@pytest.mark.parametrize("change", [{"alpha": 0.6}, {"colormap": "magma"}, {"contours": (0.7,)}, {"caption": False}])
def test_a_change_of_style_differs_from_the_golden_image(change):
    assert golden.differences(golden.outputs(Style(**{"contours": (0.5,), "caption": True, **change})))
