"""heatlens: ask a server why an image model said what it said.

    from heatlens import Client

    with Client("localhost:50051") as client:
        result = client.explain("cat.jpg")
    result.explanations[0].heatmap.save("why.png", image="cat.jpg")

This package holds the clients and what they return. It loads no deep-learning library.
"""

from heatlens._calls.async_client import AsyncClient
from heatlens._calls.client import Client
from heatlens._calls.settings import TLS, Retry
from heatlens._evaluation.evaluate import evaluate
from heatlens._evaluation.evaluation import Evaluation, Failure, MethodScores
from heatlens._exceptions import (
    CallCancelledError,
    DeadlineExceededError,
    FailedPreconditionError,
    FieldViolation,
    HeatlensError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    StatusCode,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)
from heatlens._results.frame import FrameResult
from heatlens._results.geometry import PixelBox, place_map
from heatlens._results.heatmap import Heatmap
from heatlens._results.results import (
    ClassScore,
    Explanation,
    Faithfulness,
    Health,
    ModelInfo,
    ModelState,
    Result,
    ServerInfo,
    Timing,
)
from heatlens._stream.async_stream import AsyncStream
from heatlens._stream.stream import Stream
from heatlens._version import __version__

__all__ = [
    "TLS",
    "AsyncClient",
    "AsyncStream",
    "CallCancelledError",
    "ClassScore",
    "Client",
    "DeadlineExceededError",
    "Evaluation",
    "Explanation",
    "FailedPreconditionError",
    "Failure",
    "Faithfulness",
    "FieldViolation",
    "FrameResult",
    "Health",
    "HeatlensError",
    "Heatmap",
    "InternalError",
    "InvalidArgumentError",
    "MethodScores",
    "ModelInfo",
    "ModelState",
    "NotFoundError",
    "PermissionDeniedError",
    "PixelBox",
    "ResourceExhaustedError",
    "Result",
    "Retry",
    "ServerInfo",
    "StatusCode",
    "Stream",
    "Timing",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "__version__",
    "evaluate",
    "place_map",
]

# Tracebacks, reprs and documentation say heatlens.Client: where a name is written is nobody's business but ours.
for _name in __all__:
    if _name != "__version__":
        globals()[_name].__module__ = "heatlens"
del _name
