"""A stock tritonclient, in an environment of its own, gets the maps that the SDK gets."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from heatlens import Client
from heatlens_server.transports.grpc.v2 import inference_pb2, reflection
from server_process import wait_settled
from server_toml import model_toml, server_toml

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-triton" / "bin" / "python"


def run_tritonclient(*arguments):
    """What tritonclient was told."""
    assert PYTHON.exists(), "make .venv-triton/.ready installs the environment"
    program = ROOT / "tests" / "support" / "triton_calls.py"
    done = subprocess.run([PYTHON, program, *arguments], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def said(server, chelsea_path):
    return run_tritonclient(server.address, chelsea_path)


def assert_same(told, expected):
    """One image's tensors and what the SDK got for it."""
    assert told["CLASS_ID"] == [one.class_id for one in expected.explanations]
    assert told["LABEL"] == [one.label for one in expected.explanations]
    np.testing.assert_allclose(told["SCORE"], [one.probability for one in expected.explanations], atol=1e-6)
    np.testing.assert_allclose(told["MAP"], [one.heatmap.values for one in expected.explanations], atol=1e-6)


def of_image(told, i):
    return {name: told[name][i] for name in ("CLASS_ID", "LABEL", "SCORE", "MAP")}


def test_maps_are_those_of_the_sdk(server, said, chelsea_path):
    pixels = np.arange(2 * 64 * 48 * 3, dtype=np.uint8).reshape(2, 64, 48, 3)
    with Client(server.address) as client:
        asked = {"top_k": 2, "method": "layer-cam", "layers": ["body"], "map_size": "input"}
        assert_same(of_image(said["file"], 0), client.explain(chelsea_path, **asked))
        for i, class_id in enumerate((3, 7)):
            assert_same(of_image(said["batch"], i), client.explain(pixels[i], class_ids=[class_id]))
        default = client.explain(chelsea_path)
    for error, told in (said["async"], said["stream"][0], said["stream"][2]):
        assert error is None
        assert_same(of_image(told, 0), default)
    assert (said["file"]["id"], said["file"]["model"]) == ("one", "tiny")
    assert said["outputs"] == ["SCORE"]


def test_a_stream_is_in_order_and_goes_on_after_an_error(said):
    assert [told and told["id"] for _, told in said["stream"]] == ["0", None, "2"]
    assert said["stream"][1][0][1].startswith("IMAGE: not a JPEG")


def test_what_is_there_is_told(said):
    assert (said["live"], said["ready"], said["models ready"]) == (True, True, [True, False])
    assert said["server"]["name"] == "heatlens"
    assert (said["model"]["name"], said["model"]["platform"]) == ("tiny", "heatlens")
    assert [one["name"] for one in said["model"]["inputs"]] == ["IMAGE", "TARGET_CLASS"]
    config = said["config"]
    assert (config["name"], config["platform"], config["max_batch_size"]) == ("tiny", "heatlens", 16)
    image = {"name": "IMAGE", "data_type": "TYPE_UINT8", "format": "FORMAT_NHWC", "dims": ["-1", "-1", "3"]}
    assert config["input"][0] == image
    assert {one["name"]: one["data_type"] for one in config["output"]}["LABEL"] == "TYPE_STRING"
    assert json.loads(config["parameters"]["layers"]["string_value"]) == ["body", "stem"]
    states = {one["name"]: one["state"] for one in said["index"]}
    assert states == {"tiny": "READY", "tiny_mlp": "READY", "broken": "UNAVAILABLE", "efficientnet_lite0": "READY"}
    (counts,) = said["statistics"]
    assert counts["name"] == "tiny"
    assert int(counts["inference_count"]) >= 7
    for name in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        assert int(counts["inference_stats"][name]["count"]) >= 6
        assert int(counts["inference_stats"][name]["ns"]) > 0


def test_administrators_load_reload_and_unload(launch, tmp_path):
    admin = '[admin]\nenabled = true\ntoken = "admin"\n'
    toml = server_toml(admin, model_toml("a", "tiny_mlp"))
    running = launch(toml)
    wait_settled(running.address)
    (tmp_path / "server.toml").write_text(f"{toml}\n{model_toml('b', 'tiny_mlp')}\n")
    said = run_tritonclient(running.address, "", "admin")
    ready = [{"name": name, "state": "READY"} for name in "ab"]
    found = {key: [{**one, "version": ""} for one in said[key]] for key in ("before", "loaded", "unloaded", "after")}
    found = {
        key: [{name: text for name, text in one.items() if text} for one in models] for key, models in found.items()
    }
    assert found == {"before": ready[:1], "loaded": ready, "unloaded": ready[:1], "after": ready[:1]}
    assert running.log().count("model a ready") == 2, "a model that serves is loaded again"
    assert {name: status for name, (status, _) in said["errors"].items()} == {
        "no administrator": "StatusCode.PERMISSION_DENIED",
        "wrong token": "StatusCode.PERMISSION_DENIED",
        "model": "StatusCode.NOT_FOUND",
        "not loaded": "StatusCode.NOT_FOUND",
        "configuration": "StatusCode.INVALID_ARGUMENT",
    }
    assert "'config'" in said["errors"]["configuration"][1]


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("model", "NOT_FOUND", "there is no model 'nope'"),
        ("version", "NOT_FOUND", "'nope'"),
        ("image", "INVALID_ARGUMENT", "IMAGE: not a JPEG"),
        ("parameter", "INVALID_ARGUMENT", "parameters.top_k: must be in [1, "),
        ("sequence", "INVALID_ARGUMENT", "unknown parameter 'sequence_"),
        ("shared memory", "INVALID_ARGUMENT", "the parameter 'shared_memory_"),
        ("timeout", "DEADLINE_EXCEEDED", "the deadline passed"),
        ("load", "PERMISSION_DENIED", "admin.enabled is not set"),
        ("log settings", "UNIMPLEMENTED", ""),
    ],
)
def test_errors_are_exceptions_with_status_and_message(said, name, code, message):
    status, text = said["errors"][name]
    assert status == f"StatusCode.{code}"
    assert message in text


def test_the_example_of_the_page_runs_and_prints_what_it_says(server, tmp_path):
    page = (ROOT / "docs" / "v2.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (printed,) = re.findall(r"^```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    photo = ROOT / "server" / "heatlens_server" / "backends" / "torch" / "export" / "photos" / "chelsea.jpg"
    shutil.copy(photo, tmp_path / "cat.jpg")
    code = code.replace("localhost:50051", server.address)
    done = subprocess.run([PYTHON, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    said, real = ([line.rpartition(": ") for line in text.splitlines()] for text in (printed, done.stdout))
    assert [label for label, _, _ in said] == [label for label, _, _ in real]
    assert [float(share[:-1]) for *_, share in said] == pytest.approx(
        [float(share[:-1]) for *_, share in real], abs=0.15
    )


def test_names_and_numbers_are_tritons():
    """What reflection tells, compared with the descriptors that tritonclient has."""
    code = """
import sys
from google.protobuf import descriptor_pool
from tritonclient.grpc import service_pb2
theirs, pool = descriptor_pool.Default(), descriptor_pool.DescriptorPool()
ours = pool.AddSerializedFile(bytes.fromhex(sys.stdin.read())) or pool.FindFileByName("inference.proto")
def compare(one):
    other = theirs.FindMessageTypeByName(one.full_name)
    for field in one.fields:
        same = other.fields_by_number[field.number]
        def said(of):
            kind = of.message_type or of.enum_type
            choice = of.containing_oneof
            return of.name, of.type, of.is_repeated, choice and choice.name, kind and kind.full_name
        assert said(field) == said(same), (said(field), said(same))
    for enum in one.enum_types:
        compare_enum(enum)
    for nested in one.nested_types:
        compare(nested)
def compare_enum(one):
    found, other = ({v.name: v.number for v in e.values} for e in (one, theirs.FindEnumTypeByName(one.full_name)))
    assert found.items() <= other.items()
for message in ours.message_types_by_name.values():
    compare(message)
for enum in ours.enum_types_by_name.values():
    compare_enum(enum)
for method in ours.services_by_name["GRPCInferenceService"].methods:
    same = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name[method.name]
    for kind in ("input_type", "output_type"):
        assert getattr(method, kind).full_name == getattr(same, kind).full_name
print(len(ours.message_types_by_name))
"""
    file = reflection.pool().FindFileByName("inference.proto").serialized_pb
    done = subprocess.run(
        [PYTHON, "-c", code], input=file.hex(), capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stderr, int(done.stdout)) == ("", len(inference_pb2.DESCRIPTOR.message_types_by_name))


def test_stubs_of_both_live_in_one_process():
    """Messages of the package `inference` would be registered twice: see the proto."""
    code = "import tritonclient.grpc; import inference_pb2 as ours; print(ours.DESCRIPTOR.package)"
    folder = Path(inference_pb2.__file__).parent
    done = subprocess.run([PYTHON, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "heatlens_server.transports.grpc.v2"
