"""Draw on an explained frame: the map in colours, and a banner with the classes and their probabilities."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import cv2

from heatlens._results.geometry import Float32Array, PixelBox
from heatlens._results.images import UInt8Array
from heatlens._results.overlay import blend
from heatlens._results.results import Result

NO_ANSWER = "no answer"
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


@dataclass(frozen=True, slots=True, eq=False)
class Annotation:
    """What an answer draws on a frame, and on those that follow until the next answer.

    Attributes:
        values: float32 (H, W) in [0, 1], the map placed on the frame; None: no map.
        region: what the model saw, in pixels of the frame.
        lines: the banner's text.
    """

    values: Float32Array | None
    region: PixelBox
    lines: tuple[str, ...]


FAILED = Annotation(values=None, region=PixelBox(0, 0, 0, 0), lines=(NO_ANSWER,))


def annotation_of(result: Result, size: tuple[int, int]) -> Annotation:
    """Return what an answer draws on frames of `size` (width, height): the first class's map, every class's name."""
    first = result.explanations[0].heatmap
    lines = tuple(
        f"{item.probability:>4.0%}  {_one_line(item.label) or f'class {item.class_id}'}" for item in result.explanations
    )
    return Annotation(values=first.on(size), region=first.region, lines=lines)


def draw(pixels: UInt8Array, annotation: Annotation | None, *, colormap: str, alpha: float) -> UInt8Array:
    """Draw an annotation on a frame.

    Args:
        pixels: uint8 (H, W, 3), RGB.
        annotation: what to draw; None: nothing.
        colormap: name of an OpenCV colour map.
        alpha: opacity of the map, in [0, 1].

    Returns:
        uint8 (H, W, 3), RGB, a new array.

    Raises:
        InvalidArgumentError: no such colour map, or alpha is not in [0, 1].
    """
    if annotation is None:
        return pixels.copy()
    if annotation.values is None:
        drawn = pixels.copy()
    else:
        drawn = blend(pixels, annotation.values, annotation.region, colormap=colormap, alpha=alpha)
    _draw_banner(drawn, annotation.lines)
    return drawn


def _draw_banner(pixels: UInt8Array, lines: Sequence[str]) -> None:
    """Darken the top of a frame and write the lines on it, as many as fit; at least one."""
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
