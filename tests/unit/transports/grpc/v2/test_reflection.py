"""Descriptors by their names on the wire, though this process has them in a package of its own."""

import pytest

from heatlens.v1 import explain_pb2
from heatlens_server.transports.grpc.v2 import inference_pb2
from heatlens_server.transports.grpc.v2.reflection import SERVICE, pool


def test_the_service_and_its_messages_have_their_own_names():
    found = pool().FindServiceByName(SERVICE)
    ours = inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert [method.name for method in found.methods] == [method.name for method in ours.methods]
    for method in found.methods:
        assert {method.input_type.file.package, method.output_type.file.package} == {"inference"}
    sent = found.methods_by_name["ModelInfer"].input_type.fields_by_name["inputs"].message_type
    assert sent.full_name == "inference.ModelInferRequest.InferInputTensor"
    assert [(one.name, one.number) for one in sent.fields] == [
        (one.name, one.number) for one in inference_pb2.ModelInferRequest.InferInputTensor.DESCRIPTOR.fields
    ]


def test_what_this_process_has_is_there_too_and_nothing_else():
    named = pool()
    assert named.FindFileContainingSymbol("heatlens.v1.ExplainService").name == explain_pb2.DESCRIPTOR.name
    assert named.FindFileByName(explain_pb2.DESCRIPTOR.name).package == "heatlens.v1"
    for name in ("inference.Nope", "nope.Nope"):
        with pytest.raises(KeyError):
            named.FindFileContainingSymbol(name)
    with pytest.raises(KeyError):
        named.FindFileByName("nope.proto")
