"""heatlens: ask a server why an image model said what it said.

    from heatlens import Client

    with Client("localhost:50051") as client:
        result = client.explain("cat.jpg")
    result.explanations[0].heatmap.save("why.png", image="cat.jpg")

This package holds the clients and what they return. It loads no deep-learning library. A name is loaded when it is
first used, so that `import heatlens.v1.explain_pb2` costs the generated stubs alone.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from heatlens._version import __version__

if TYPE_CHECKING:
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
    from heatlens._results.geometry import PixelBox, place_map
    from heatlens._results.heatmap import Heatmap
    from heatlens._results.results import (
        ClassScore,
        DeviceInfo,
        Explanation,
        Faithfulness,
        FrameResult,
        Health,
        ModelInfo,
        ModelState,
        Preprocess,
        Result,
        ServerInfo,
        Timing,
    )
    from heatlens._stream.async_stream import AsyncStream
    from heatlens._stream.stream import Stream

__all__ = [
    "TLS",
    "AsyncClient",
    "AsyncStream",
    "CallCancelledError",
    "ClassScore",
    "Client",
    "DeadlineExceededError",
    "DeviceInfo",
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
    "Preprocess",
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

# Where each name is written.
_MODULES = {
    "_calls.async_client": "AsyncClient",
    "_calls.client": "Client",
    "_calls.settings": "Retry TLS",
    "_evaluation.evaluate": "evaluate",
    "_evaluation.evaluation": "Evaluation Failure MethodScores",
    "_exceptions": (
        "CallCancelledError DeadlineExceededError FailedPreconditionError FieldViolation HeatlensError "
        "InternalError InvalidArgumentError NotFoundError PermissionDeniedError ResourceExhaustedError "
        "StatusCode UnauthenticatedError UnavailableError UnimplementedError"
    ),
    "_results.geometry": "PixelBox place_map",
    "_results.heatmap": "Heatmap",
    "_results.results": (
        "ClassScore DeviceInfo Explanation Faithfulness FrameResult Health ModelInfo ModelState Preprocess Result "
        "ServerInfo Timing"
    ),
    "_stream.async_stream": "AsyncStream",
    "_stream.stream": "Stream",
}
_HOMES = {name: f"heatlens.{module}" for module, names in _MODULES.items() for name in names.split()}

# Type checkers see the imports above, and report names that do not exist.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Load a name when it is first used."""
        if name == "v1":
            # The stubs are there too for programs that import only heatlens.
            import_module("heatlens.v1.explain_pb2_grpc")
            import_module("heatlens.v1.model_pb2_grpc")
            return globals()[name]
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import_module(_HOMES[name])
        for other, module in _HOMES.items():
            if other not in globals() and (value := getattr(sys.modules.get(module), other, None)) is not None:
                # Tracebacks, reprs and documentation say heatlens.Client: the file is an implementation detail.
                value.__module__ = __name__
                globals()[other] = value
        return globals()[name]

    def __dir__() -> list[str]:
        """Return the names, loaded or not."""
        return sorted({*globals(), *__all__})
