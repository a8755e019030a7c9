"""From answers, models and limits to responses."""

from datetime import timedelta

import numpy as np
import numpy.typing as npt

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import faithfulness_pb2, model_pb2
from heatlens_server.api.answer import Answer, ClassScore, Explanation
from heatlens_server.api.models import ServerInfo, supported_methods
from heatlens_server.api.query import MapType
from heatlens_server.core.geometry import PixelBox
from heatlens_server.core.preprocess import PreprocessSpec
from heatlens_server.fleet.served_model import ModelState, ModelStatus, ServedModel
from heatlens_server.transports.grpc.requests import METHOD_TO_PROTO

_DATA_TYPES = {
    MapType.FLOAT32.value: pb.DATA_TYPE_FLOAT32,
    MapType.FLOAT16.value: pb.DATA_TYPE_FLOAT16,
    MapType.UINT8.value: pb.DATA_TYPE_UINT8,
}

_STATES = {
    ModelState.LOADING: model_pb2.Model.STATE_LOADING,
    ModelState.READY: model_pb2.Model.STATE_READY,
    ModelState.FAILED: model_pb2.Model.STATE_FAILED,
    ModelState.UNAVAILABLE: model_pb2.Model.STATE_UNAVAILABLE,
    ModelState.IDLE: model_pb2.Model.STATE_IDLE,
}


def response_of(answer: Answer) -> pb.ExplainResponse:
    """The response that an answer makes."""
    timing = answer.timing
    return pb.ExplainResponse(
        explanations=[_explanation(explanation) for explanation in answer.explanations],
        predictions=[_class_score(score) for score in answer.predictions],
        source_region=_box(answer.image.region),
        source_width_px=answer.image.source_width_px,
        source_height_px=answer.image.source_height_px,
        model=answer.model,
        model_version=answer.model_version,
        timing=pb.Timing(
            queue_duration=timedelta(seconds=timing.queue_s),
            preprocess_duration=timedelta(seconds=timing.preprocess_s),
            compute_duration=timedelta(seconds=timing.compute_s),
            batch_size=timing.batch_size,
        ),
        predicted_mask=None if answer.mask is None else _tensor(answer.mask),
        embedding=None if answer.embedding is None else _tensor(answer.embedding),
        warnings=answer.warnings,
    )


def model_of(status: ModelStatus, *, is_default_version: bool = True) -> model_pb2.Model:
    """A model as ListModels tells it.

    Args:
        status: of the model.
        is_default_version: whether it is the version that answers for the others of its name.
    """
    told = model_pb2.Model(
        name=status.name,
        version=status.version,
        state=_STATES[status.state],
        state_message=status.message,
        is_default_version=is_default_version,
        weight=status.config.weight,
        next_engine=status.next_engine,
    )
    if status.about is not None:
        told.MergeFrom(_about(status.about))
    if status.served is not None:
        told.weights_bytes = sum(status.served.weights_bytes().values())
        told.devices.extend(
            model_pb2.Device(name=device.name, in_service=not device.fault, message=device.fault)
            for device in status.served.queue.devices
        )
    return told


def _about(served: ServedModel) -> model_pb2.Model:
    capabilities = served.capabilities
    support = supported_methods(capabilities)
    return model_pb2.Model(
        task=capabilities.task.value,
        input_height_px=capabilities.input_height_px,
        input_width_px=capabilities.input_width_px,
        class_count=served.class_count,
        methods=[METHOD_TO_PROTO[one.method] for one in support],
        method_support=[
            model_pb2.MethodSupport(method=METHOD_TO_PROTO[one.method], engine=one.engine, in_steps=one.in_steps)
            for one in support
        ],
        layers=capabilities.layers,
        engine=capabilities.engine_name,
        device=capabilities.device,
        precision=capabilities.precision,
        default_method=METHOD_TO_PROTO[served.default_method],
        max_batch_size=served.max_batch_size,
        max_queue_delay=timedelta(seconds=served.max_delay_s),
        assumptions=served.assumptions,
        activation=capabilities.activation.value,
        runs_one_by_one=capabilities.runs_one_by_one,
        input_channels=capabilities.input_channels,
        preprocess=_preprocess(served.preprocess),
    )


def _preprocess(spec: PreprocessSpec) -> model_pb2.Preprocess:
    return model_pb2.Preprocess(
        window=spec.window,
        window_auto=spec.window_auto,
        resize_px=[spec.resize_px] if isinstance(spec.resize_px, int) else spec.resize_px,
        crop_px=spec.crop_px,
        max_side_px=spec.max_side_px or 0,
        interpolation=spec.interpolation.value,
        letterbox=spec.letterbox,
        pad_to_multiple=spec.pad_to_multiple,
        channel_order=spec.channel_order.value if spec.has_colors else "",
        scale=spec.scale,
        mean=spec.mean,
        std=spec.std,
    )


def server_info_of(info: ServerInfo) -> model_pb2.GetServerInfoResponse:
    """The server as GetServerInfo tells it."""
    limits = info.limits
    return model_pb2.GetServerInfoResponse(
        version=info.version,
        max_message_bytes=limits.max_message_bytes,
        max_image_pixels=limits.max_image_pixels,
        max_queue_length=limits.max_queue_length,
        max_targets=limits.max_targets,
        max_in_flight=limits.max_in_flight,
        max_streams=limits.max_streams,
        max_image_parts=limits.max_image_parts,
        max_image_samples=limits.max_image_samples,
        max_decoding_bytes=limits.max_decoding_bytes,
        max_bytes_in_flight=limits.max_bytes_in_flight,
        max_connection_bytes_in_flight=limits.max_connection_bytes_in_flight,
        max_model_runs=limits.max_model_runs,
        max_batch_size=info.max_batch_size,
        max_queue_delay=timedelta(seconds=info.max_delay_s),
    )


def _explanation(explanation: Explanation) -> pb.Explanation:
    score, measured = explanation.class_score, explanation.faithfulness
    return pb.Explanation(
        class_id=score.class_id,
        label=score.label,
        logit=score.logit,
        probability=score.probability,
        value=score.value,
        map=_tensor(explanation.map_values),
        map_scale=explanation.map_scale,
        map_offset=explanation.map_offset,
        box=None if explanation.box is None else _box(explanation.box),
        area=explanation.area,
        faithfulness=None
        if measured is None
        else faithfulness_pb2.Faithfulness(**{metric.replace("-", "_"): value for metric, value in measured.items()}),
        predicted_mask=None if explanation.mask is None else _tensor(explanation.mask),
    )


def _class_score(score: ClassScore) -> pb.ClassScore:
    return pb.ClassScore(
        class_id=score.class_id,
        label=score.label,
        logit=score.logit,
        probability=score.probability,
        value=score.value,
    )


def _tensor(values: npt.NDArray[np.generic]) -> pb.Tensor:
    """Elements of one of `MapType`."""
    return pb.Tensor(data_type=_DATA_TYPES[values.dtype.str], shape=values.shape, data=values.tobytes())


def _box(box: PixelBox) -> pb.PixelBox:
    return pb.PixelBox(left=box.left, top=box.top, right=box.right, bottom=box.bottom)
