"""Segmentation on the wire: classes, over the pixels predicted as them or over a mask that the caller sends."""

from collections.abc import Sequence

import numpy as np

from heatlens.v1 import explain_pb2 as pb
from heatlens_server.api.limits import Limits
from heatlens_server.api.tasks.base import Wanted, class_target, refuse_others
from heatlens_server.api.violations import Violations
from heatlens_server.core.arrays import BoolArray, Float32Array
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.methods import Metric
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.core.results import Finding, ImageResult
from heatlens_server.core.targets import Pixels, Target, TopK
from heatlens_server.core.tasks import Task
from heatlens_server.fleet.served_model import ServedModel
from heatlens_server.imaging.mask import fit_mask, mask_from_tensor
from heatlens_server.transports.grpc.names import data_type_name


class SegmentationWire:
    """Implements `api.tasks.base.TaskWire`."""

    predicts = False
    mirrors = False
    measures = frozenset(Metric) - {Metric.CLASS_SENSITIVITY}
    recurs = True

    def wanted(self, options: pb.ExplainOptions, model: ServedModel, limits: Limits, wrong: Violations) -> Wanted:
        """The classes; the one of most pixels if none is named."""
        refuse_others(options, Task.SEGMENTATION, wrong)
        classes = class_target(
            options,
            class_count=model.capabilities.class_count,
            max_targets=limits.max_targets,
            wrong=wrong,
            default=TopK(1),
        )
        if not options.HasField("mask"):
            return Wanted(Pixels(classes))
        try:
            mask = mask_from_tensor(
                data_type=data_type_name(options.mask.data_type),
                shape=tuple(options.mask.shape),
                data=options.mask.data,
                max_pixels=limits.max_image_pixels,
            )
        except InvalidArgument as error:
            wrong.add_error(error.within("options.{}".format))
            return Wanted(Pixels(classes))

        def complete(image: FittedImage) -> Target:
            return Pixels(classes, _fitted(mask, image))

        return Wanted(Pixels(classes), complete)

    def findings(self, result: ImageResult) -> Sequence[Finding]:
        """As the engine found them."""
        return result.findings or ()

    def probabilities(self, result: ImageResult) -> Float32Array:  # noqa: ARG002 - pixels have them, images do not
        """None."""
        return np.empty(0, np.float32)


def _fitted(mask: BoolArray, image: FittedImage) -> BoolArray:
    try:
        return fit_mask(mask, image)
    except InvalidArgument as error:
        raise error.within("options.{}".format) from None
