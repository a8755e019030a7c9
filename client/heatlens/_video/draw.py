"""Draw on an explained frame: the map in colours, and a banner with the classes and their probabilities."""

from dataclasses import dataclass

from heatlens._results.drawing import caption, draw_banner
from heatlens._results.geometry import Float32Array, PixelBox
from heatlens._results.images import UInt8Array
from heatlens._results.overlay import blend
from heatlens._results.results import Result

NO_ANSWER = "no answer"
NOTHING_FOUND = "nothing found"


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
    """Return what an answer draws on frames of `size` (width, height): the first class's map, every class's name.

    A flat map is not drawn, which its line says. A detector may have found nothing.
    """
    if not result.explanations:
        return Annotation(values=None, region=result.source_region, lines=(NOTHING_FOUND,))
    first = result.explanations[0].heatmap
    lines = tuple(caption(item) for item in result.explanations)
    return Annotation(values=None if first.is_flat else first.on(size), region=first.region, lines=lines)


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
    draw_banner(drawn, annotation.lines)
    return drawn
