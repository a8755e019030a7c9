"""How explained frames look."""

from dataclasses import replace

import numpy as np
import pytest

from heatlens import Explanation, Heatmap, InvalidArgumentError, PixelBox, Result, Timing
from heatlens._video.draw import FAILED, Annotation, annotation_of, draw

SIZE = (320, 180)
EVERYWHERE = PixelBox(0, 0, *SIZE)
STYLE = {"colormap": "jet", "alpha": 0.5}


@pytest.fixture
def frame():
    return np.random.default_rng(0).integers(100, 200, (SIZE[1], SIZE[0], 3), np.uint8)


def explanation(label="cat", probability=0.75, class_id=3, region=EVERYWHERE, scale=1, offset=0, **fields):
    values = np.array([[0, 0.5], [0.25, 1]], np.float32) * bool(scale)
    heatmap = Heatmap(values=values, scale=scale, offset=offset, region=region, placed=False)
    return Explanation(class_id=class_id, label=label, logit=1.0, probability=probability, heatmap=heatmap, **fields)


def result(*explanations):
    return Result(
        explanations=explanations,
        predictions=(),
        source_region=EVERYWHERE,
        source_size=SIZE,
        model="tiny",
        model_version="1",
        timing=Timing(queue_ms=0, preprocess_ms=0, compute_ms=0, batch_size=1),
    )


def banner_height(drawn, frame):
    """How many rows are darkened."""
    return int((drawn[:, -1].mean(-1) < 0.6 * frame[:, -1].mean(-1)).sum())


def text_look(*lines):
    return Annotation(values=None, region=EVERYWHERE, lines=lines)


def test_the_look_of_an_answer():
    look = annotation_of(result(explanation(), explanation("dog", 0.041, 5), explanation("", 1.0, 7)), SIZE)
    assert look.lines == (" 75%  cat", "  4%  dog", "100%  class 7")
    assert look.values.shape == (180, 320)
    np.testing.assert_array_equal(look.values, explanation().heatmap.on(SIZE))


@pytest.mark.parametrize(("offset", "note"), [(0, "nothing speaks for it"), (0.5, "every pixel speaks for it alike")])
def test_a_flat_map_is_not_drawn_but_said(frame, offset, note):
    look = annotation_of(result(explanation(scale=0, offset=offset), explanation("dog", 0.041, 5)), SIZE)
    assert look.lines == (f" 75%  cat: {note}", "  4%  dog")
    drawn = draw(frame, look, **STYLE)
    height = banner_height(drawn, frame)
    assert height > 12
    np.testing.assert_array_equal(drawn[height:], frame[height:])


def test_a_frame_in_which_nothing_was_found(frame):
    look = annotation_of(result(), SIZE)
    assert look.lines == ("nothing found",)
    height = banner_height(drawn := draw(frame, look, **STYLE), frame)
    np.testing.assert_array_equal(drawn[height:], frame[height:])


def test_a_regression_shows_its_value():
    items = explanation("age", 0.0, value=41.53), explanation("", 0.0, 2, scale=0, value=-0.25)
    assert annotation_of(result(*items), SIZE).lines == ("41.53  age", "-0.25  output 2: nothing moves it this way")


def test_every_detection_is_drawn_with_its_box_and_all_their_maps(frame):
    left, right = PixelBox(20, 60, 120, 160), PixelBox(180, 50, 300, 170)
    items = explanation(box=left), explanation("dog", 0.5, 5, box=right), explanation("dog", 0.4, 5, scale=0, box=left)
    turned = replace(items[1].heatmap, values=np.array([[1, 0], [0, 0]], np.float32))
    items = items[0], replace(items[1], heatmap=turned), items[2]
    look = annotation_of(result(*items), SIZE)
    assert look.lines == ()
    np.testing.assert_array_equal(look.values, np.maximum(items[0].heatmap.on(SIZE), turned.on(SIZE)))
    drawn = draw(frame, look, colormap="jet", alpha=0)
    changed = (drawn != frame).any(2)
    for box in (left, right):
        assert changed[int(box.top) : int(box.bottom), int(box.left)].all()
        assert changed[int(box.bottom) - 1, int(box.left) : int(box.right)].all()
        # Label and score, above it.
        assert changed[int(box.top) - 10 : int(box.top), int(box.left) : int(box.left) + 30].any()
    assert not changed[65:155, 25:115].any()
    # No banner.
    assert not changed[:20].any()


@pytest.mark.parametrize(
    "box",
    [PixelBox(0, 0, 320, 180), PixelBox(-50, -50, 20, 20), PixelBox(310, 0, 400, 5), PixelBox(5, 5, 5.2, 5.2)],
)
@pytest.mark.parametrize("label", ["cat", "long " * 50, "", "猫"])
def test_boxes_and_their_labels_stay_within_the_frame(frame, box, label):
    drawn = draw(frame, annotation_of(result(explanation(label, box=box)), SIZE), **STYLE)
    assert drawn.shape == frame.shape


def test_the_map_is_drawn_below_the_banner_as_the_sdk_draws_it(frame):
    item = explanation()
    drawn = draw(frame, annotation_of(result(item), SIZE), **STYLE)
    height = banner_height(drawn, frame)
    assert 12 <= height <= 40
    np.testing.assert_array_equal(drawn[height:], item.heatmap.overlay(frame, **STYLE)[height:])


def test_frames_are_not_written_to(frame):
    before = frame.copy()
    for look in (None, FAILED, annotation_of(result(explanation()), SIZE)):
        drawn = draw(frame, look, **STYLE)
        assert drawn is not frame
        np.testing.assert_array_equal(frame, before)
    np.testing.assert_array_equal(draw(frame, None, **STYLE), frame)


def test_a_failed_frame_keeps_its_colours_and_says_so(frame):
    drawn = draw(frame, FAILED, **STYLE)
    height = banner_height(drawn, frame)
    np.testing.assert_array_equal(drawn[height:], frame[height:])
    assert drawn[:height].max() > 240


def test_text_differs_and_is_white_on_dark(frame):
    cat, dog = (draw(frame, text_look(word), **STYLE)[:20] for word in ("cat", "dog"))
    assert (cat != dog).any()
    assert cat.max() > 220


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (64, 48), (333, 77), (1920, 1080), (30, 900)])
@pytest.mark.parametrize("label", ["cat", "Ägyptische Katze 猫 قطة 🙂", "", "long " * 200, "line\nbreak\ttab\x00"])
def test_any_size_and_any_label(size, label):
    pixels = np.full((size[1], size[0], 3), 128, np.uint8)
    item = explanation(label=label, region=PixelBox(0, 0, *size))
    drawn = draw(pixels, annotation_of(result(item, item, item), size), **STYLE)
    assert drawn.shape == pixels.shape
    assert drawn.dtype == np.uint8


def test_the_banner_leaves_most_of_the_frame_free(frame):
    lines = [f"{index}" for index in range(50)]
    assert banner_height(draw(frame, text_look(*lines), **STYLE), frame) < 0.5 * SIZE[1]
    assert banner_height(draw(frame, text_look(*lines[:2]), **STYLE), frame) > banner_height(
        draw(frame, text_look(lines[0]), **STYLE), frame
    )


def test_text_that_is_too_long_is_cut_within_the_margins(frame):
    drawn = draw(frame, text_look("W" * 500), **STYLE)
    bright = np.flatnonzero((drawn[:16] > 220).all(-1).any(0))
    assert bright.min() >= 3
    assert SIZE[0] * 0.8 < bright.max() < SIZE[0] - 3


def test_text_grows_with_the_frame():
    heights = []
    for scale in (1, 3):
        pixels = np.full((240 * scale, 320 * scale, 3), 128, np.uint8)
        drawn = draw(pixels, text_look("HHH"), **STYLE)
        rows = np.flatnonzero((drawn > 220).all(-1).any(1))
        heights.append(rows.max() - rows.min() + 1)
    assert heights[1] / heights[0] == pytest.approx(3, abs=0.7)


@pytest.mark.parametrize("style", [{"colormap": "nope", "alpha": 0.5}, {"colormap": "jet", "alpha": 2}])
def test_styles_that_do_not_exist(frame, style):
    with pytest.raises(InvalidArgumentError):
        draw(frame, annotation_of(result(explanation()), SIZE), **style)
