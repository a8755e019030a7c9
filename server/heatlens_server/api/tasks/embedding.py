"""Embeddings on the wire: how similar an image is to a reference, and why."""

from collections.abc import Sequence

import numpy as np

from heatlens.v1 import explain_pb2 as pb
from heatlens_server.api.images import fit_image, parse_image
from heatlens_server.api.limits import Limits
from heatlens_server.api.tasks.base import Wanted, refuse_others
from heatlens_server.api.violations import Violations
from heatlens_server.core.arrays import Float32Array
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.methods import Metric
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.core.results import Finding, ImageResult
from heatlens_server.core.targets import Similarity, Target
from heatlens_server.core.tasks import Task
from heatlens_server.fleet.served_model import ServedModel
from heatlens_server.imaging.mask import vector_from_tensor
from heatlens_server.transports.grpc.names import data_type_name

_NOTHING = Similarity(np.ones(1, np.float32))
"""Stands for the reference until it is known."""


class EmbeddingWire:
    """Implements `api.tasks.base.TaskWire`."""

    predicts = False
    mirrors = True
    measures = frozenset(Metric) - {Metric.CLASS_SENSITIVITY}
    recurs = True

    def wanted(self, options: pb.ExplainOptions, model: ServedModel, limits: Limits, wrong: Violations) -> Wanted:
        """The similarity to the reference embedding, or to the reference image's."""
        refuse_others(options, Task.EMBEDDING, wrong)
        target = options.WhichOneof("target")
        if target is not None:
            wrong.add(
                f"options.{target}", "an embedding model has no classes: it explains the similarity to a reference"
            )
        kind = options.WhichOneof("reference")
        if kind is None:
            wrong.add(
                "options.reference_embedding",
                "an embedding model explains the similarity to a reference: set reference_embedding or reference_image",
            )
            return Wanted(_NOTHING)
        if kind == "reference_embedding":
            tensor = options.reference_embedding
            try:
                vector = vector_from_tensor(
                    data_type=data_type_name(tensor.data_type),
                    shape=tuple(tensor.shape),
                    data=tensor.data,
                    length=model.capabilities.class_count,
                )
            except InvalidArgument as error:
                wrong.add_error(error.within("options.reference_{}".format))
                return Wanted(_NOTHING)
            return Wanted(Similarity(vector))
        field = "options.reference_image"
        image = parse_image(options.reference_image, limits, wrong, field=field)

        def complete(_image: FittedImage) -> Target:
            return Similarity(fit_image(image, model.preprocess, limits, field=field).pixels)

        return Wanted(_NOTHING, complete)

    def findings(self, result: ImageResult) -> Sequence[Finding]:
        """As the engine found them."""
        return result.findings or ()

    def probabilities(self, result: ImageResult) -> Float32Array:  # noqa: ARG002 - there are no classes
        """None."""
        return np.empty(0, np.float32)
