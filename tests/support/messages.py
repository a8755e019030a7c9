"""Images and maps as protobuf messages, and the details of errors, for tests that go below the SDK."""

import cv2
import grpc
import numpy as np
from google.rpc import error_details_pb2, status_pb2

from heatlens.v1 import explain_pb2 as pb


def pixels(image: np.ndarray) -> pb.Image:
    """uint8, uint16 or float32 (H, W, C) or (H, W) as an image of pixels."""
    data_type = pb.DataType.Value(f"DATA_TYPE_{image.dtype.name.upper()}")
    return pb.Image(pixels=pb.Tensor(data_type=data_type, shape=image.shape, data=image.tobytes()))


def encoded(image: np.ndarray, extension: str = ".png") -> pb.Image:
    """RGB uint8 (H, W, 3) as a file."""
    return pb.Image(encoded=cv2.imencode(extension, image[..., ::-1])[1].tobytes())


def distinct(count: int, px: int = 64) -> list[np.ndarray]:
    """Images that all look different: blocks of random colours."""
    rng = np.random.default_rng(7)
    return [
        np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((px // 4, px // 4, 1))).astype(np.uint8) for _ in range(count)
    ]


def map_of(explanation: pb.Explanation) -> np.ndarray:
    """A float32 map (h, w)."""
    return np.frombuffer(explanation.map.data, "<f4").reshape(tuple(explanation.map.shape))


class Details:
    """The rich details of an error."""

    @classmethod
    def of(cls, error: grpc.RpcError) -> "Details | None":
        """None where gRPC itself failed the call, before any code of the server's."""
        has_details = any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata() or ())
        return cls(error) if has_details else None

    def __init__(self, error: grpc.RpcError) -> None:
        trailing = dict(error.trailing_metadata() or ())
        self.request_id = trailing.get("x-request-id")
        self.pushback_ms = trailing.get("grpc-retry-pushback-ms")
        status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
        self.message = status.message
        self.info = error_details_pb2.ErrorInfo()
        self.bad_request = error_details_pb2.BadRequest()
        self.resource = error_details_pb2.ResourceInfo()
        self.retry = error_details_pb2.RetryInfo()
        self.precondition = error_details_pb2.PreconditionFailure()
        self.has_retry = False
        for packed in status.details:
            for target in (self.info, self.bad_request, self.resource, self.retry, self.precondition):
                if packed.Is(target.DESCRIPTOR):
                    packed.Unpack(target)
                    self.has_retry = self.has_retry or target is self.retry

    @property
    def fields(self) -> list[str]:
        """Paths of the wrong fields."""
        return [violation.field for violation in self.bad_request.field_violations]
