"""Write on pictures: what is said of an explanation, in a banner or at the box of a detection."""

from bisect import bisect_left
from collections.abc import Sequence
from functools import reduce

import cv2
import numpy as np

from heatlens._results.geometry import Float32Array
from heatlens._results.images import UInt8Array
from heatlens._results.results import Explanation

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_WHITE = (255, 255, 255)
# The height of a line as a part of the frame's shorter side, and its limits in pixels.
_LINE_SHARE = 1 / 11
_MIN_LINE_PX, _MAX_LINE_PX = 12, 72
# The height of capital letters as a part of a line's height.
_CAPITAL_SHARE = 0.5
# The brightness of the frame under the banner: dark enough for white text on snow.
_BANNER_LIGHT = 0.3
# The banner covers at most this part of the frame's height.
_BANNER_SHARE = 0.4


# The same of a box's line of text.
_TAG_SHARE = 1 / 18
_MIN_TAG_PX, _MAX_TAG_PX = 12, 40
# A box's lines, as a part of the picture's shorter side.
_BOX_LINE_SHARE = 1 / 160
# Colours of boxes by class, dark enough for white text: matplotlib's tab10, without its yellow and gray.
_BOX_COLORS = (
    (214, 39, 40),
    (31, 119, 180),
    (44, 140, 44),
    (148, 103, 189),
    (200, 90, 10),
    (140, 86, 75),
    (200, 60, 150),
    (20, 140, 155),
)


def caption(item: Explanation) -> str:
    """Return what a picture says of an explanation: its probability or value, its class, whether its map is flat."""
    kind = "class" if item.value is None else "output"
    name = _one_line(item.label) or f"{kind} {item.class_id}"
    note = flat_note(item)
    score = f"{item.probability:>4.0%}" if item.value is None else f"{item.value:.4g}"
    return f"{score}  {name}{': ' if note else ''}{note}"


def flat_note(item: Explanation) -> str:
    """Return what an explanation's flat map means, in words; empty if the map is not flat."""
    if not item.heatmap.is_flat:
        return ""
    if item.heatmap.offset > 0:
        return "every pixel speaks for it alike"
    return "nothing speaks for it" if item.value is None else "nothing moves it this way"


def joined_map(items: Sequence[Explanation], size: tuple[int, int]) -> Float32Array | None:
    """Return the largest of the maps at each pixel of an image of `size` (width, height); None if all are flat.

    Returns:
        float32 (height, width), in [0, 1].
    """
    maps = [item.heatmap.on(size) for item in items if not item.heatmap.is_flat]
    return reduce(np.maximum, maps) if maps else None


def draw_banner(pixels: UInt8Array, lines: Sequence[str]) -> None:
    """Darken the top of a picture, uint8 (H, W, 3), in place, and write lines there, as many as fit; at least one."""
    height_px, width_px = pixels.shape[:2]
    line_px = _line_px(pixels, _LINE_SHARE, _MIN_LINE_PX, _MAX_LINE_PX)
    lines = lines[: max(int(height_px * _BANNER_SHARE) // line_px, 1)]
    banner = pixels[: min(line_px * len(lines) + line_px // 4, height_px)]
    banner[:] = cv2.convertScaleAbs(banner, alpha=_BANNER_LIGHT)
    margin_px = line_px // 3
    for index, line in enumerate(lines):
        # The margin on top makes up for what hangs below.
        top_px = line_px * index + line_px // 8
        _write(pixels, line, (margin_px, top_px), line_px=line_px, width_px=width_px - 2 * margin_px)


def draw_boxes(pixels: UInt8Array, items: Sequence[Explanation]) -> None:
    """Draw the boxes of detections on a picture, uint8 (H, W, 3), in place, the first on top, each with its caption."""
    height_px, width_px = pixels.shape[:2]
    line_px = _line_px(pixels, _TAG_SHARE, _MIN_TAG_PX, _MAX_TAG_PX)
    thickness = max(round(min(height_px, width_px) * _BOX_LINE_SHARE), 1)
    margin_px = line_px // 4
    for item in reversed(items):
        if item.box is None:
            continue
        color = _BOX_COLORS[item.class_id % len(_BOX_COLORS)]
        left, right = (round(min(max(x, 0), width_px - 1)) for x in (item.box.left, item.box.right - 1))
        top, bottom = (round(min(max(y, 0), height_px - 1)) for y in (item.box.top, item.box.bottom - 1))
        cv2.rectangle(pixels, (left, top), (right, bottom), color, thickness)
        text = " ".join(caption(item).split())
        text_px = min(_width_px(text, line_px), width_px - 2 * margin_px)
        # Above the box where there is room, or else inside; and within the picture.
        tag_left = max(min(left, width_px - text_px - 2 * margin_px), 0)
        tag_top = top - line_px if top >= line_px else top
        tag_right = tag_left + text_px + 2 * margin_px - 1
        cv2.rectangle(pixels, (tag_left, tag_top), (tag_right, tag_top + line_px - 1), color, cv2.FILLED)
        _write(pixels, text, (tag_left + margin_px, tag_top), line_px=line_px, width_px=text_px)


def _line_px(pixels: UInt8Array, share: float, least_px: int, most_px: int) -> int:
    """Return the height of a line of text on a picture, in pixels."""
    shorter_px: int = min(pixels.shape[:2])
    return round(min(max(shorter_px * share, least_px), most_px))


def _font(line_px: int) -> tuple[float, int]:
    """Return the scale and the thickness of text for lines of this height."""
    (_, capital_px), _ = cv2.getTextSize("H", _FONT, 1.0, 1)
    return line_px * _CAPITAL_SHARE / capital_px, 2 if line_px >= 2 * _MIN_LINE_PX else 1


def _width_px(text: str, line_px: int) -> int:
    wide_px: int = cv2.getTextSize(text, _FONT, *_font(line_px))[0][0]
    return wide_px


def _write(pixels: UInt8Array, text: str, corner: tuple[int, int], *, line_px: int, width_px: int) -> None:
    """Write white text in the line whose left upper corner is given, cut so that it is no wider than `width_px`."""
    scale, thickness = _font(line_px)
    # The capitals' middle is the line's middle.
    baseline = corner[1] + round(line_px * (1 + _CAPITAL_SHARE) / 2)
    fitted = _fitted(text, width_px, line_px)
    cv2.putText(pixels, fitted, (corner[0], baseline), _FONT, scale, _WHITE, thickness, cv2.LINE_AA)


def _fitted(text: str, width_px: int, line_px: int) -> str:
    """Return the text, cut so that it is no wider than `width_px`."""
    if _width_px(text, line_px) <= width_px:
        return text
    length = bisect_left(
        range(len(text)), True, key=lambda index: _width_px(text[: index + 1].rstrip() + "..", line_px) > width_px
    )
    return text[:length].rstrip() + ".."


def _one_line(label: str) -> str:
    """Return a label without line breaks and other control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in label).split())
