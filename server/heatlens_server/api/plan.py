"""How images are to be explained, once a request's options are known to be valid."""

from collections.abc import Callable
from dataclasses import dataclass

from heatlens_server.core.engine import MapSpec
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.core.targets import Detections, Target


@dataclass(frozen=True, slots=True)
class ExplainPlan:
    """Valid options.

    Attributes:
        target: what is wanted.
        spec: how the engine makes the maps.
        place_on_source: True if maps are to be placed on the source image.
        map_dtype: numpy dtype of the maps on the wire.
        top_predictions: how many classes to list.
        complete: makes the target that the engine gets, once an image is prepared; None if `target` is that. It may
            raise InvalidArgument.
    """

    target: Target
    spec: MapSpec
    place_on_source: bool
    map_dtype: str
    top_predictions: int
    complete: Callable[[FittedImage], Target] | None = None

    @property
    def target_count(self) -> int:
        """How many maps the answer holds at most."""
        return self.target.count

    @property
    def counts_boxes(self) -> bool:
        """Whether only the model can say how many maps there are: one per box that it finds."""
        return isinstance(self.target, Detections)
