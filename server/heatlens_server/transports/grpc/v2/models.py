"""From models to the protocol's messages: what they take and give, how they stand, and what they did."""

import json
from collections.abc import Iterable, Iterator, Sequence

from heatlens_server.api.models import supported_methods
from heatlens_server.fleet.served_model import ModelState, ModelStatus, ServedModel
from heatlens_server.telemetry.statistics import ModelCounts, Total
from heatlens_server.transports.grpc.v2 import inference_pb2 as pb
from heatlens_server.transports.grpc.v2.responses import OUTPUTS

PLATFORM = "heatlens"

_STATES = {
    ModelState.LOADING: "LOADING",
    ModelState.READY: "READY",
    ModelState.FAILED: "UNAVAILABLE",
    ModelState.UNAVAILABLE: "UNAVAILABLE",
    # As ModelReady: a request is answered.
    ModelState.IDLE: "READY",
}


def metadata_of(model: ServedModel, versions: Sequence[str]) -> pb.ModelMetadataResponse:
    """What a model takes and gives. Here a tensor has one datatype; docs/v2.md has the others that are taken."""
    tensor = pb.ModelMetadataResponse.TensorMetadata
    return pb.ModelMetadataResponse(
        name=model.name,
        versions=versions,
        platform=PLATFORM,
        inputs=[tensor(name=name, datatype=kind, shape=[-1, *dims]) for name, kind, dims in _inputs(model)],
        outputs=[tensor(name=name, datatype=kind, shape=[-1, *dims]) for name, kind, dims in _outputs()],
    )


def config_of(model: ServedModel) -> pb.ModelConfig:
    """The same as Triton's configuration says it, without the side of the images, and what is known of the model."""
    capabilities = model.capabilities
    about = {
        "task": capabilities.task.value,
        "default_method": model.default_method.value,
        "methods": json.dumps([one.method for one in supported_methods(capabilities)]),
        "layers": json.dumps(capabilities.layers),
        "labels": json.dumps(model.labels),
    }
    return pb.ModelConfig(
        name=model.name,
        platform=PLATFORM,
        backend=capabilities.engine_name,
        max_batch_size=model.max_batch_size,
        input=[
            pb.ModelInput(
                name=name,
                data_type=_data_type(kind),
                dims=dims,
                format=pb.ModelInput.FORMAT_NHWC if name == "IMAGE" else pb.ModelInput.FORMAT_NONE,
                optional=name != "IMAGE",
            )
            for name, kind, dims in _inputs(model)
        ],
        output=[pb.ModelOutput(name=name, data_type=_data_type(kind), dims=dims) for name, kind, dims in _outputs()],
        dynamic_batching=pb.ModelDynamicBatching(max_queue_delay_microseconds=round(model.max_delay_s * 1e6)),
        parameters={name: pb.ModelParameter(string_value=text) for name, text in about.items()},
    )


def index_of(statuses: Iterable[ModelStatus], *, ready: bool) -> pb.RepositoryIndexResponse:
    """The models and their states; with `ready` those alone that can answer."""
    return pb.RepositoryIndexResponse(
        models=[
            pb.RepositoryIndexResponse.ModelIndex(
                name=status.name, version=status.version, state=_STATES[status.state], reason=_reason(status)
            )
            for status in statuses
            if status.can_answer or not ready
        ]
    )


def statistics_of(name: str, versions: Sequence[str], counts: ModelCounts) -> pb.ModelStatistics:
    """What a model did, all of its versions together."""
    return pb.ModelStatistics(
        name=name,
        version=versions[0] if len(versions) == 1 else "",
        last_inference=round(counts.last_at * 1e3),
        inference_count=counts.computed.count,
        execution_count=counts.runs,
        inference_stats=pb.InferStatistics(
            success=_duration(counts.answered),
            fail=_duration(counts.failed),
            queue=_duration(counts.queued),
            compute_input=_duration(counts.decoded),
            compute_infer=_duration(counts.computed),
            compute_output=_duration(counts.encoded),
        ),
    )


def _inputs(model: ServedModel) -> Iterator[tuple[str, str, list[int]]]:
    """Name, datatype and the sides behind that of the images."""
    yield "IMAGE", "UINT8", [-1, -1, model.capabilities.input_channels]
    yield "TARGET_CLASS", "INT64", [-1]


def _outputs() -> Iterator[tuple[str, str, list[int]]]:
    for name, output in OUTPUTS.items():
        yield name, output.datatype, [-1] * (1 + output.sides)


def _data_type(datatype: str) -> str:
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"


def _reason(status: ModelStatus) -> str:
    if status.state is not ModelState.IDLE:
        return status.message
    return "; ".join(filter(None, ["idle: the next request loads it", status.message]))


def _duration(total: Total) -> pb.StatisticDuration:
    return pb.StatisticDuration(count=total.count, ns=round(total.seconds * 1e9))
