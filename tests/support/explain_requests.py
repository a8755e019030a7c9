"""Requests to explain with tiny models, and what is refused in them."""

import dataclasses
import re

import pytest
from google.protobuf.message import Message

import tiny_models
from heatlens.v1 import explain_pb2 as pb
from heatlens_server.api.checks import Limits, SourceImage
from heatlens_server.api.plan import Plan, plan_query
from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.methods import PRESETS, Method
from heatlens_server.fleet.served_model import ServedModel
from heatlens_server.transports.grpc.requests import explain_path, query_of
from loaded_models import loaded

LIMITS = Limits(
    max_message_bytes=1 << 20, max_image_pixels=5000, max_queue_length=8, max_targets=4, max_streams=2, max_in_flight=8
)
PIXELS = pb.Image(pixels=pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=(2, 3, 3), data=bytes(range(18))))


class NoQueue:
    """Of a model that is asked nothing."""

    engines = devices = ()


def served(module, layers) -> ServedModel:
    model = loaded(module, layers)
    engine = TorchEngine(model, device="cpu")
    methods = {*Method} - {*PRESETS, Method.LE_GRAD} - ({Method.CAM} - {*engine.info.methods})
    info = dataclasses.replace(engine.info, methods=tuple(method for method in Method if method in methods))
    engine.close()
    return ServedModel(
        name="tiny",
        version="0",
        labels=(),
        preprocess=model.preprocess,
        capabilities=info,
        default_method=Method.GRAD_CAM,
        max_batch_size=4,
        max_delay_s=0.0,
        queue=NoQueue(),
    )


TINY = served(tiny_models.tiny(), ("body", "stem"))
TINY_MLP = served(tiny_models.tiny_mlp(), ("body",))


def request(**options) -> pb.ExplainRequest:
    return pb.ExplainRequest(image=PIXELS, options=pb.ExplainOptions(**options))


def planned(sent: pb.ExplainRequest, model: ServedModel = TINY, limits: Limits = LIMITS) -> tuple[Plan, SourceImage]:
    """What the server makes of a request; its errors name paths of the request."""
    try:
        return plan_query(query_of(sent), model, limits)
    except InvalidArgument as error:
        raise error.within(explain_path) from None


def plan_of(sent: pb.ExplainRequest, model: ServedModel = TINY, limits: Limits = LIMITS) -> Plan:
    return planned(sent, model, limits)[0]


def refusal(sent: pb.ExplainRequest, model: ServedModel = TINY, limits: Limits = LIMITS) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as raised:
        planned(sent, model, limits)
    return raised.value


def fields(error: InvalidArgument) -> list[str]:
    return [violation.field for violation in error.violations]


def assert_path_exists(message: type[Message], path: str) -> None:
    """Every name of a field path is a field of the contract."""
    descriptor = message.DESCRIPTOR
    for name in re.sub(r"\[\d+\]", "", path).split("."):
        found = descriptor.fields_by_name[name]
        descriptor = found.message_type
