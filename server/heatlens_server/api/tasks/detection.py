"""Detection on the wire: one explanation per box above a score, best first."""

from collections.abc import Sequence

import numpy as np

from heatlens.v1 import explain_pb2 as pb
from heatlens_server.api.limits import Limits
from heatlens_server.api.tasks.base import Wanted, class_target, refuse_others
from heatlens_server.api.violations import Violations
from heatlens_server.core.arrays import Float32Array
from heatlens_server.core.methods import Metric
from heatlens_server.core.results import Finding, ImageResult
from heatlens_server.core.targets import ClassIds, Detections, TopK
from heatlens_server.core.tasks import Task
from heatlens_server.fleet.served_model import ServedModel

_DEFAULT_MIN_SCORE = 0.5


class DetectionWire:
    """Implements `api.tasks.base.TaskWire`."""

    predicts = False
    mirrors = False
    measures = frozenset(Metric) - {Metric.CLASS_SENSITIVITY}
    # Of a class there may be many boxes, and which is which in the next frame nothing says.
    recurs = False

    def wanted(self, options: pb.ExplainOptions, model: ServedModel, limits: Limits, wrong: Violations) -> Wanted:
        """The detections: `top_k` best ones, or those of the classes named; all, if nothing is said."""
        refuse_others(options, Task.DETECTION, wrong)
        min_score = options.min_score if options.HasField("min_score") else _DEFAULT_MIN_SCORE
        if not 0 <= min_score <= 1:
            wrong.add("options.min_score", f"must be in [0, 1]; got {min_score:g}")
        chosen = class_target(
            options,
            class_count=model.capabilities.class_count,
            max_targets=limits.max_targets,
            wrong=wrong,
            default=TopK(limits.max_targets),
            # top_k counts boxes, and a class may have many.
            largest_k=limits.max_targets,
        )
        if isinstance(chosen, ClassIds):
            return Wanted(Detections(min_score, limits.max_targets, chosen.ids))
        return Wanted(Detections(min_score, max(1, chosen.k)))

    def findings(self, result: ImageResult) -> Sequence[Finding]:
        """As the engine found them."""
        return result.findings or ()

    def probabilities(self, result: ImageResult) -> Float32Array:  # noqa: ARG002 - boxes have them, images do not
        """None."""
        return np.empty(0, np.float32)
