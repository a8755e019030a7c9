"""Write on pictures: what is said of an explanation, and a banner with such lines."""

from bisect import bisect_left
from collections.abc import Sequence

import cv2

from heatlens._results.heatmap import Heatmap
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


def caption(item: Explanation) -> str:
    """Return what a picture says of an explanation: its probability, its class, and whether its map is flat."""
    name = _one_line(item.label) or f"class {item.class_id}"
    note = flat_note(item.heatmap)
    return f"{item.probability:>4.0%}  {name}{': ' if note else ''}{note}"


def flat_note(heatmap: Heatmap) -> str:
    """Return what a flat map means, in words; empty if the map is not flat."""
    if not heatmap.is_flat:
        return ""
    return "every pixel speaks for it alike" if heatmap.offset > 0 else "nothing speaks for it"


def draw_banner(pixels: UInt8Array, lines: Sequence[str]) -> None:
    """Darken the top of a picture, uint8 (H, W, 3), in place, and write lines there, as many as fit; at least one."""
    height_px, width_px = pixels.shape[:2]
    line_px = round(min(max(min(height_px, width_px) * _LINE_SHARE, _MIN_LINE_PX), _MAX_LINE_PX))
    lines = lines[: max(int(height_px * _BANNER_SHARE) // line_px, 1)]
    banner = pixels[: min(line_px * len(lines) + line_px // 4, height_px)]
    banner[:] = cv2.convertScaleAbs(banner, alpha=_BANNER_LIGHT)
    (_, capital_px), _ = cv2.getTextSize("H", _FONT, 1.0, 1)
    scale = line_px * _CAPITAL_SHARE / capital_px
    thickness = 2 if line_px >= 2 * _MIN_LINE_PX else 1
    margin_px = line_px // 3
    for index, line in enumerate(lines):
        # The capitals' middle is the line's middle; the margin on top makes up for what hangs below.
        baseline = line_px * index + line_px // 8 + round(line_px * (1 + _CAPITAL_SHARE) / 2)
        text = _fitted(line, width_px - 2 * margin_px, scale, thickness)
        cv2.putText(pixels, text, (margin_px, baseline), _FONT, scale, _WHITE, thickness, cv2.LINE_AA)


def _fitted(text: str, width_px: int, scale: float, thickness: int) -> str:
    """Return the text, cut so that it is no wider than `width_px`."""

    def fits(candidate: str) -> bool:
        (wide_px, _), _ = cv2.getTextSize(candidate, _FONT, scale, thickness)
        return wide_px <= width_px

    if fits(text):
        return text
    length = bisect_left(range(len(text)), True, key=lambda index: not fits(text[: index + 1].rstrip() + ".."))
    return text[:length].rstrip() + ".."


def _one_line(label: str) -> str:
    """Return a label without line breaks and other control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in label).split())
