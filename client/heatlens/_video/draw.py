"""Draw on an explained image or frame: maps in colours, boxes, and a banner with classes and their probabilities."""

from dataclasses import dataclass

from heatlens._results.drawing import caption, draw_banner, draw_boxes, joined_map
from heatlens._results.geometry import Float32Array, PixelBox
from heatlens._results.images import UInt8Array
from heatlens._results.overlay import blend
from heatlens._results.results import Explanation, Result

NO_ANSWER = "no answer"
NOTHING_FOUND = "nothing found"


@dataclass(frozen=True, slots=True, eq=False)
class Annotation:
    """What an answer draws on a frame, and on those that follow until the next answer.

    Attributes:
        values: float32 (H, W) in [0, 1], the map placed on the frame; None: no map.
        region: what the model saw, in pixels of the frame.
        lines: the banner's text; empty: no banner.
        detections: whose boxes are drawn.
    """

    values: Float32Array | None
    region: PixelBox
    lines: tuple[str, ...]
    detections: tuple[Explanation, ...] = ()


FAILED = Annotation(values=None, region=PixelBox(0, 0, 0, 0), lines=(NO_ANSWER,))


def annotation_of(result: Result, size: tuple[int, int]) -> Annotation:
    """Return what an answer draws on frames of `size` (width, height).

    Of classes the first one's map, and every one's caption; of detections all boxes with their captions, and all maps.
    A flat map is not drawn, which its caption says. A detector may have found nothing.
    """
    if not result.explanations:
        return Annotation(values=None, region=result.source_region, lines=(NOTHING_FOUND,))
    if result.explanations[0].box is not None:
        values = joined_map(result.explanations, size)
        return Annotation(values, result.source_region, lines=(), detections=result.explanations)
    lines = tuple(caption(item) for item in result.explanations)
    return Annotation(joined_map(result.explanations[:1], size), result.source_region, lines)


def one_annotation(item: Explanation, size: tuple[int, int]) -> Annotation:
    """Return what one explanation draws on an image of `size` (width, height): a caption only where one is needed."""
    detections = () if item.box is None else (item,)
    lines = (caption(item),) if item.heatmap.is_flat and not detections else ()
    return Annotation(joined_map([item], size), item.heatmap.region, lines, detections)


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
    drawn = blend(pixels, annotation.values, annotation.region, colormap=colormap, alpha=alpha)
    draw_boxes(drawn, annotation.detections)
    if annotation.lines:
        draw_banner(drawn, annotation.lines)
    return drawn
