"""Descriptors for reflection: the service and its messages under the names that they have on the wire.

In this process they are in a package of our own, see the proto.
"""

from google.protobuf import descriptor_pool, text_format
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto

from heatlens_server.transports.grpc.v2 import inference_pb2 as pb

PACKAGE = "inference"

SERVICE = f"{PACKAGE}.GRPCInferenceService"


def pool() -> descriptor_pool.DescriptorPool:
    """All descriptors of this process, and those of `SERVICE`."""
    return descriptor_pool.DescriptorPool(_Files())


class _Files:
    """What the pool looks up, by the names that it calls. What is not there raises KeyError."""

    def __init__(self) -> None:
        ours = _proto_of(pb.DESCRIPTOR)
        renamed = text_format.MessageToString(ours).replace(f'".{ours.package}.', f'".{PACKAGE}.')
        self._service = text_format.Parse(renamed, FileDescriptorProto())
        self._service.name, self._service.package = f"{PACKAGE}.proto", PACKAGE
        self._process = descriptor_pool.Default()

    def FindFileByName(self, name: str) -> FileDescriptorProto:  # noqa: N802 - protobuf's name
        return self._service if name == self._service.name else _proto_of(self._process.FindFileByName(name))

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptorProto:  # noqa: N802 - protobuf's name
        if symbol.partition(".")[0] == PACKAGE:
            return self._service
        return _proto_of(self._process.FindFileContainingSymbol(symbol))


def _proto_of(file: FileDescriptor) -> FileDescriptorProto:
    found = FileDescriptorProto()
    file.CopyToProto(found)
    return found
