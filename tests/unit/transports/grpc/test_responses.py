"""From answers to responses: every field, and the element type of every map."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from heatlens._wire.answers import models_of
from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import model_pb2
from heatlens_server.api.answer import Answer, ClassScore, Explanation
from heatlens_server.api.query import MapType
from heatlens_server.config import ModelConfig
from heatlens_server.core.engine import Capabilities
from heatlens_server.core.geometry import PixelBox
from heatlens_server.core.methods import Method, Metric
from heatlens_server.core.preprocess import ChannelOrder, FittedImage, Interpolation, PreprocessSpec
from heatlens_server.fleet.fleet import ModelState, ModelStatus
from heatlens_server.fleet.served_model import ServedModel
from heatlens_server.scheduling.entry import Timing
from heatlens_server.scheduling.model_queue import DeviceStatus
from heatlens_server.transports.grpc.responses import model_of, response_of

IMAGE = FittedImage(np.zeros((4, 4, 3), np.uint8), PixelBox(2, 0, 10, 8), source_width_px=12, source_height_px=8)
QUEUE = SimpleNamespace(engines=(), devices=(DeviceStatus("cpu#0", ""), DeviceStatus("cpu#1", "its runs fail")))
VALUES = np.array([[0.0, 0.25], [0.5, 1.0]], np.float32)
TIMING = Timing(preprocess_s=0.5, queue_s=0.001, compute_s=0.25, batch_size=3)
SCORE = ClassScore(2, "bird", 3.0, 0.75)


def answer(*explanations: Explanation, **values) -> Answer:
    return Answer(explanations, values.pop("predictions", ()), IMAGE, "m", "7", TIMING, **values)


def test_every_field():
    full = Explanation(
        SCORE,
        VALUES,
        2.0,
        0.125,
        box=PixelBox(1, 2, 3, 4),
        area=0.5,
        faithfulness={Metric.ROAD_MORF: 0.25},
        mask=np.array([[1, 0]], np.uint8),
    )
    sent = response_of(
        answer(full, predictions=(SCORE,), mask=np.array([[1, 2, 3]], np.uint8), embedding=np.ones(2, np.float32))
    )
    assert (sent.model, sent.model_version, sent.source_width_px, sent.source_height_px) == ("m", "7", 12, 8)
    assert sent.source_region == pb.PixelBox(left=2, top=0, right=10, bottom=8)
    assert sent.timing.queue_duration.ToMicroseconds() == 1_000
    assert sent.timing.preprocess_duration.ToMicroseconds() == 500_000
    assert sent.timing.compute_duration.ToMicroseconds() == 250_000
    assert sent.timing.batch_size == 3
    assert list(sent.predictions) == [pb.ClassScore(class_id=2, label="bird", logit=3.0, probability=0.75)]
    (one,) = sent.explanations
    assert (one.class_id, one.label, one.logit, one.probability, one.area) == (2, "bird", 3.0, 0.75, 0.5)
    assert (one.map_scale, one.map_offset, one.box) == (2.0, 0.125, pb.PixelBox(left=1, top=2, right=3, bottom=4))
    assert [field.name for field, _ in one.faithfulness.ListFields()] == ["road_morf"]
    assert one.predicted_mask == pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=(1, 2), data=bytes([1, 0]))
    assert one.map == pb.Tensor(data_type=pb.DATA_TYPE_FLOAT32, shape=(2, 2), data=VALUES.tobytes())
    assert sent.predicted_mask == pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=(1, 3), data=bytes([1, 2, 3]))
    assert sent.embedding == pb.Tensor(data_type=pb.DATA_TYPE_FLOAT32, shape=(2,), data=b"\0\0\x80\x3f" * 2)


def test_what_an_answer_lacks_is_not_set():
    sent = response_of(answer(Explanation(SCORE, VALUES, 1.0, 0.0)))
    assert not any(sent.HasField(name) for name in ("predicted_mask", "embedding"))
    assert not any(sent.explanations[0].HasField(name) for name in ("box", "faithfulness", "predicted_mask"))


@pytest.mark.parametrize(
    ("map_type", "data_type"),
    [
        (MapType.FLOAT32, pb.DATA_TYPE_FLOAT32),
        (MapType.FLOAT16, pb.DATA_TYPE_FLOAT16),
        (MapType.UINT8, pb.DATA_TYPE_UINT8),
    ],
)
def test_element_types(map_type, data_type):
    values = VALUES.astype(map_type.value)
    (one,) = response_of(answer(Explanation(SCORE, values, 1.0, 0.0))).explanations
    assert (one.map.data_type, one.map.data) == (data_type, values.tobytes())


@pytest.mark.parametrize(
    ("changes", "sent"),
    [
        ({}, {"resize_px": (256,), "crop_px": (224, 192), "channel_order": "rgb", "window": None}),
        ({"resize_px": (256, 200)}, {"resize_px": (256, 200)}),
        ({"resize_px": None, "crop_px": None, "max_side_px": 800, "pad_to_multiple": 32},
         {"resize_px": (), "crop_px": (), "max_side_px": 800, "pad_to_multiple": 32}),
        ({"mean": (0.485,), "std": (0.229,)}, {"channel_order": "", "mean": (0.485,), "std": (0.229,)}),
        ({"scale": 255.0, "channel_order": ChannelOrder.BGR}, {"scale": 255.0, "channel_order": "bgr"}),
        ({"window": (0.0, 4095.0)}, {"window": (0.0, 4095.0)}),
        ({"window_auto": True}, {"window": "auto"}),
        ({"resize_px": (224, 192), "letterbox": True}, {"letterbox": True}),
    ],
)  # fmt: skip
def test_the_sdk_reads_what_a_models_preprocessing_is(changes, sent):
    spec = PreprocessSpec(256, (224, 192), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), Interpolation.BICUBIC)
    spec = dataclasses.replace(spec, **changes)
    info = Capabilities(
        "torch", "cpu", "fp32", 224, 192, 4, (Method.GRAD_CAM,), ("body",), input_channels=spec.channels
    )
    served = ServedModel("m", "7", (), spec, info, Method.GRAD_CAM, 1, 0.0, queue=QUEUE)
    status = ModelStatus(ModelConfig(name="m", source="timm:x"), ModelState.READY, served)
    (model,) = models_of(model_pb2.ListModelsResponse(models=[model_of(status)]))
    assert model.input_channels == spec.channels
    assert model.preprocess.interpolation == "bicubic"
    assert {name: getattr(model.preprocess, name) for name in sent} == sent
    assert [(device.name, device.in_service, device.message) for device in model.devices] == [
        ("cpu#0", True, ""),
        ("cpu#1", False, "its runs fail"),
    ]
    assert model.is_degraded


@pytest.mark.parametrize("alone", [False, True])
def test_whether_images_run_one_by_one(alone):
    spec = PreprocessSpec(256, (224, 192), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), Interpolation.BICUBIC)
    info = Capabilities("torch", "cpu", "fp32", 224, 192, 4, (Method.GRAD_CAM,), ("body",), runs_one_by_one=alone)
    served = ServedModel("m", "7", (), spec, info, Method.GRAD_CAM, 1, 0.0, queue=QUEUE)
    sent = model_of(ModelStatus(ModelConfig(name="m", source="timm:x"), ModelState.READY, served))
    assert sent.runs_one_by_one is alone
