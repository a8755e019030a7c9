"""What the wire costs per call: building, serialising, parsing and reading both messages."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from rich.table import Table

from bench.measure import take_turns
from heatlens import PixelBox
from heatlens._wire.answers import result_of
from heatlens._wire.requests import explain_request
from heatlens.v1 import explain_pb2 as pb
from heatlens_server.api.answer import answer_of
from heatlens_server.api.checks import Limits
from heatlens_server.api.plan import Plan, plan_query
from heatlens_server.core.engine import Capabilities, MapSpec
from heatlens_server.core.methods import CLOSED_FORMS, Method
from heatlens_server.core.preprocess import FittedImage, PreprocessSpec
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import TopK
from heatlens_server.fleet.served_model import ServedModel
from heatlens_server.scheduling.entry import QueueResult, Timing
from heatlens_server.transports.grpc.requests import query_of
from heatlens_server.transports.grpc.responses import response_of

if TYPE_CHECKING:
    from heatlens_server.scheduling.model_queue import ModelQueue

MAX_MS = 0.2
CALLS = 50

_PIXELS = np.zeros((224, 224, 3), np.uint8)
_RESULT = ImageResult(
    logits=np.linspace(-5, 5, 1000, dtype=np.float32),
    class_ids=(999,),
    maps=np.random.default_rng(0).random((1, 7, 7), np.float32),
    scales=np.ones(1, np.float32),
    offsets=np.zeros(1, np.float32),
)
_EXPLAINED = QueueResult(
    result=_RESULT,
    image=FittedImage(pixels=_PIXELS, region=PixelBox(0, 0, 224, 224), source_width_px=224, source_height_px=224),
    timing=Timing(preprocess_s=0.001, queue_s=0.001, compute_s=0.1, batch_size=8),
)
_PLAN = Plan(target=TopK(1), spec=MapSpec(Method.GRAD_CAM, ("layer",), upsample=False), top_predictions=5)
_MODEL = ServedModel(
    name="model",
    version="1",
    labels=tuple(f"class {i}" for i in range(1000)),
    preprocess=PreprocessSpec(
        resize_px=224, crop_px=(224, 224), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), interpolation="bilinear"
    ),
    capabilities=Capabilities("torch", "cpu", "fp32", 224, 224, 1000, CLOSED_FORMS, ("layer",)),
    default_method=Method.GRAD_CAM,
    max_batch_size=8,
    max_delay_s=0.0,
    queue=cast("ModelQueue", None),  # nothing here runs
)
_LIMITS = Limits(
    max_message_bytes=1 << 24,
    max_image_pixels=1 << 26,
    max_queue_length=1,
    max_targets=32,
    max_streams=1,
    max_in_flight=1,
)


def answer() -> pb.ExplainResponse:
    """An answer at layer size with five predictions."""
    return response_of(answer_of(_EXPLAINED, _PLAN, _MODEL))


def encode_ms() -> float:
    """Median time to build and serialise one answer at layer size with five predictions, in milliseconds."""
    return take_turns({"encode": _encode_calls}, turns=9).median_ms("encode") / CALLS


def run(photo: Path) -> Table:
    """Measure and tabulate one call's messages: a JPEG photo in, one 7x7 map and five predictions out."""
    request = explain_request(photo.read_bytes(), top_predictions=5)
    sent, received = request.SerializeToString(), answer().SerializeToString()
    photo_bytes = photo.read_bytes()
    steps = {
        "client: build and serialise the request": lambda: explain_request(
            photo_bytes, top_predictions=5
        ).SerializeToString(),
        "server: parse and validate the request": lambda: plan_query(
            query_of(pb.ExplainRequest.FromString(sent)), _MODEL, _LIMITS
        ),
        "server: softmax, build and serialise the answer": lambda: answer().SerializeToString(),
        "client: parse and read the answer": lambda: result_of(pb.ExplainResponse.FromString(received), placed=False),
    }
    measured = take_turns({name: _repeated(step) for name, step in steps.items()}, turns=15)
    table = Table(title=f"wire: one call, {len(sent) / 1e3:.0f} kB in, {len(received)} B out (target: <= {MAX_MS} ms)")
    table.add_column("step")
    table.add_column("ms per call", justify="right")
    total_ms = 0.0
    for name in steps:
        milliseconds = measured.median_ms(name) / CALLS
        total_ms += milliseconds
        table.add_row(name, f"{milliseconds:.4f}")
    table.add_section()
    table.add_row("all four " + ("(met)" if total_ms <= MAX_MS else "(MISSED)"), f"{total_ms:.4f}")
    return table


def _repeated(step: Callable[[], object]) -> Callable[[], None]:
    def run_all() -> None:
        for _ in range(CALLS):
            step()

    return run_all


def _encode_calls() -> None:
    for _ in range(CALLS):
        answer().SerializeToString()
