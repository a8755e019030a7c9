"""What ListModels says of models that are run by an export, with torch beside it or without."""

import dataclasses

from explain_requests import LIMITS, TINY
from fleets import fleet_of
from heatlens.v1 import method_pb2
from heatlens.v1 import model_pb2 as pb
from heatlens_server.config import Config
from heatlens_server.core.engine import Capabilities
from heatlens_server.core.methods import Method, Score
from heatlens_server.fleet.reload import Reloader
from heatlens_server.transports.grpc.services import ModelServicer

EXPORT = Capabilities("onnxruntime", "cpu", "fp32", 4, 4, 10, (Method.GRAD_CAM,), ("body", "stem"))


async def listed(capabilities: Capabilities) -> pb.Model:
    model = dataclasses.replace(TINY, capabilities=capabilities, default_method=capabilities.requestable_methods[0])
    fleet = await fleet_of(model)
    servicer = ModelServicer(fleet, LIMITS, Reloader(fleet, Config(), Config))
    (model,) = (await servicer.ListModels(pb.ListModelsRequest(), None)).models
    return model


def support(model: pb.Model) -> dict[str, tuple[str, bool]]:
    assert [one.method for one in model.method_support] == list(model.methods)
    return {
        method_pb2.Method.Name(one.method).removeprefix("METHOD_"): (one.engine, one.in_steps)
        for one in model.method_support
    }


async def test_only_what_the_export_has_not_is_said_to_be_run_by_torch():
    beside = dataclasses.replace(
        EXPORT,
        methods=(Method.GRAD_CAM, Method.SHAPLEY_CAM, Method.SCORE_CAM),
        fallback_methods=frozenset({Method.SHAPLEY_CAM, Method.SCORE_CAM}),
        scores=tuple(Score),
        fallback_scores=frozenset(Score) - {Score.LOGIT},
        has_options=True,
    )
    assert support(await listed(beside)) == {
        "GRAD_CAM": ("onnxruntime", False),
        "REFINE_CAM": ("onnxruntime", False),
        "FINER_CAM": ("torch", False),
        "SHAPLEY_CAM": ("torch", False),
        "SCORE_CAM": ("torch", True),
    }


async def test_an_export_of_the_contrast_alone_lists_finer_cam_and_runs_it():
    model = await listed(dataclasses.replace(EXPORT, scores=(Score.CONTRAST,)))
    assert support(model) == {"FINER_CAM": ("onnxruntime", False)}
    assert model.default_method == method_pb2.METHOD_FINER_CAM
