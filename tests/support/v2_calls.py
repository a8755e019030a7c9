"""The open inference protocol without a client of it: our messages, sent under the name of its service."""

import grpc.aio
import numpy as np

from heatlens_server.transports.grpc.v2 import inference_pb2 as pb

DTYPES = {"FP32": "<f4", "INT32": "<i4"}


def method(name: str) -> str:
    return f"/inference.GRPCInferenceService/{name}"


def infer_request(*images: "np.ndarray | bytes", targets=None, outputs=(), model="", request_id="", **parameters):
    """Files, or uint8 (H, W, 3) of one size, in raw contents."""
    request = pb.ModelInferRequest(model_name=model, id=request_id)
    if isinstance(images[0], bytes):
        data = b"".join(len(file).to_bytes(4, "little") + file for file in images)
        request.inputs.add(name="IMAGE", datatype="BYTES", shape=[len(images)])
    else:
        data = np.stack(images).tobytes()
        request.inputs.add(name="IMAGE", datatype="UINT8", shape=[len(images), *images[0].shape])
    request.raw_input_contents.append(data)
    if targets is not None:
        request.inputs.add(name="TARGET_CLASS", datatype="INT64", shape=np.shape(targets))
        request.raw_input_contents.append(np.array(targets, "<i8").tobytes())
    for name in outputs:
        request.outputs.add(name=name)
    for name, value in parameters.items():
        setattr(request.parameters[name], "int64_param" if isinstance(value, int) else "string_param", value)
    return request


def arrays(response) -> dict:
    """Its tensors by name; of LABEL a list."""
    found = {}
    for tensor, data in zip(response.outputs, response.raw_output_contents, strict=True):
        if tensor.datatype == "BYTES":
            found[tensor.name] = labels = []
            at = 0
            while at < len(data):
                end = at + 4 + int.from_bytes(data[at : at + 4], "little")
                labels.append(data[at + 4 : end].decode())
                at = end
        else:
            found[tensor.name] = np.frombuffer(data, DTYPES[tensor.datatype]).reshape(tuple(tensor.shape))
    return found


class V2Calls:
    """Calls by a channel. Each waits for 20 seconds at most, unless told otherwise."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    def call(self, name: str, request=None, *, timeout=20, **options):
        """Call a method; without a request the empty one."""
        kind = {"ModelInfer": pb.ModelInferResponse}.get(name) or getattr(pb, f"{name}Response")
        send = self._channel.unary_unary(method(name), lambda sent: sent.SerializeToString(), kind.FromString)
        return send(getattr(pb, f"{name}Request")() if request is None else request, timeout=timeout, **options)

    def infer(self, *images, **asked):
        return self.call("ModelInfer", infer_request(*images, **asked))

    def stream(self):
        """A stream, which the test writes and reads."""
        return self._channel.stream_stream(
            method("ModelStreamInfer"), lambda sent: sent.SerializeToString(), pb.ModelStreamInferResponse.FromString
        )()
