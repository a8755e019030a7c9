"""Clients in other languages: the example in Node.js, and what grpcurl does by reflection."""

import json
import os
import re
import subprocess
from pathlib import Path

import cv2
import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pool, json_format, message_factory
from google.rpc import status_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from heatlens import Client
from server_process import start_server_process, wait_settled
from server_toml import server_toml

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "examples" / "node" / "build" / "explain.js"
PHOTO = ROOT / "server" / "heatlens_server" / "backends" / "torch" / "export" / "photos" / "chelsea.jpg"
MODEL = '[[models]]\nname = "lite0"\nsource = "embedded:efficientnet_lite0"'
TOKEN = "a-token"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    toml = server_toml(MODEL, token=TOKEN)
    server = start_server_process(tmp_path_factory.mktemp("server"), toml)
    wait_settled(server.address, token=TOKEN)
    yield server.address
    server.process.kill()
    server.process.wait()


def node(*arguments: object, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    assert BUILT.exists(), "make examples/node/build/explain.js installs and builds it"
    environment = {**os.environ, "HEATLENS_TOKEN": token}
    command = ["node", BUILT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


def test_node_explains_a_photo_and_draws_the_map(address, tmp_path):
    done = node(address, PHOTO, tmp_path / "why.png", "lite0")
    assert (done.returncode, done.stderr) == (0, "")
    with Client(address, token=TOKEN) as client:
        expected = client.explain(PHOTO, top_k=3, map_size="source").explanations
    assert done.stdout.splitlines() == [f"{item.label}: {100 * item.probability:.1f}%" for item in expected]
    # Red, green and blue take a third each of the way from black to white.
    drawn = cv2.imread(str(tmp_path / "why.png")).astype(np.float32).sum(axis=2) / (3 * 255)
    np.testing.assert_allclose(drawn, expected[0].heatmap.values, atol=1 / 255)


@pytest.mark.parametrize(
    ("photo", "model", "token", "expected"),
    [
        (PHOTO, "other", TOKEN, ["NOT_FOUND: there is no model 'other'", "reason: MODEL_NOT_FOUND", "request: "]),
        (Path(__file__), "", TOKEN, ["INVALID_ARGUMENT: ", "reason: IMAGE_UNDECODABLE", "field: image.encoded"]),
        (PHOTO, "", "wrong", ["UNAUTHENTICATED: ", "reason: "]),
    ],
)
def test_node_says_what_is_wrong(address, tmp_path, photo, model, token, expected):
    done = node(address, photo, tmp_path / "why.png", model, token=token)
    assert (done.returncode, done.stdout) == (1, "")
    lines = done.stderr.splitlines()
    for said in expected:
        assert any(line.startswith(said) for line in lines), done.stderr
    assert not (tmp_path / "why.png").exists()


def test_node_without_arguments_says_how_it_is_called():
    assert (node().returncode, node().stderr[:6]) == (2, "usage:")


def test_the_lock_file_names_versions_and_no_places():
    folder = BUILT.parents[1]
    packages = json.loads((folder / "package-lock.json").read_text())["packages"]
    wanted = json.loads((folder / "package.json").read_text())
    for name, version in (wanted["dependencies"] | wanted["devDependencies"]).items():
        assert packages[f"node_modules/{name}"]["version"] == version
    assert not any("resolved" in package for package in packages.values())


def test_reflection_alone_is_enough_for_the_calls_in_the_documents(launch):
    """As grpcurl does it: descriptors by reflection, requests and answers as JSON, details of errors too."""
    text = (ROOT / "docs" / "client.md").read_text()
    methods = re.findall(r"grpcurl -plaintext (?:-d @ )?localhost:50051 (\S+)", text)
    assert methods == ["list", "heatlens.v1.ModelService/ListModels", "heatlens.v1.ExplainService/Explain"]
    (request,) = re.findall(r'echo "(.*)" \|', text)
    encoded = subprocess.run(["base64", "-w0", PHOTO], capture_output=True, text=True, check=True).stdout
    request = request.replace("$(base64 -w0 cat.jpg)", encoded).replace('\\"', '"')
    server = launch(server_toml(MODEL, reflection=True))
    wait_settled(server.address)
    with grpc.insecure_channel(server.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = descriptor_pool.DescriptorPool(database)
        assert {name.rpartition("/")[0] for name in methods[1:]} <= set(database.get_services())

        def call(path: str, asked: str) -> dict:
            service, _, name = path.partition("/")
            method = pool.FindServiceByName(service).methods_by_name[name]
            kinds = [message_factory.GetMessageClass(kind) for kind in (method.input_type, method.output_type)]
            stub = channel.unary_unary(f"/{path}", kinds[0].SerializeToString, kinds[1].FromString)
            return json_format.MessageToDict(stub(json_format.Parse(asked, kinds[0]()), timeout=30))

        assert [model["name"] for model in call(methods[1], "{}")["models"]] == ["lite0"]
        explanations = call(methods[2], request)["explanations"]
        assert [item["label"] for item in explanations] == ["Egyptian cat", "tiger cat", "tabby"]
        # The open inference protocol, by the names that Triton's clients know.
        assert call("inference.GRPCInferenceService/ModelReady", '{"name": "lite0"}') == {"ready": True}
        config = call("inference.GRPCInferenceService/ModelConfig", "{}")["config"]
        assert config["input"][0]["dataType"] == "TYPE_UINT8"
        with pytest.raises(grpc.RpcError) as caught:
            call(methods[2], "{}")
        details = dict(caught.value.trailing_metadata())["grpc-status-details-bin"]
        read = {}
        for detail in status_pb2.Status.FromString(details).details:
            kind = message_factory.GetMessageClass(pool.FindMessageTypeByName(detail.TypeName()))
            read[detail.TypeName()] = kind.FromString(detail.value)
        assert read["google.rpc.ErrorInfo"].reason
        assert [violation.field for violation in read["google.rpc.BadRequest"].field_violations] == ["image"]
