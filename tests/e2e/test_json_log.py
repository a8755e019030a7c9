"""The JSON log of a real server: every line is an object, also gRPC's own; call lines say where the time went."""

import json
import signal

import grpc

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc
from messages import distinct, pixels
from server_process import wait_settled
from server_toml import model_toml, server_toml


def test_every_line_is_json_and_call_lines_have_their_stages(launch):
    toml = server_toml(model_toml("tiny_mlp"), log_format="json")
    running = launch(toml, env={"GRPC_VERBOSITY": "INFO", "GRPC_TRACE": "http"})
    wait_settled(running.address)
    with grpc.insecure_channel(running.address) as channel:
        stub = explain_pb2_grpc.ExplainServiceStub(channel)
        metadata = [("x-request-id", "mine")]
        answer = stub.Explain(pb.ExplainRequest(image=pixels(distinct(1)[0])), timeout=60, metadata=metadata)
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(60) == 0
    lines = [json.loads(line) for line in running.log().splitlines()]
    assert "info" in {line["level"] for line in lines if line["logger"] == "grpc"}
    (line,) = [line for line in lines if line.get("request_id") == "mine"]
    assert (line["event"], line["code"], line["model"], line["explanation"]) == ("call", "OK", "tiny_mlp", "grad-cam")
    timing = answer.timing
    for name, stage in (("decode", timing.preprocess_duration), ("queue", timing.queue_duration)):
        assert abs(line[f"{name}_ms"] - stage.ToNanoseconds() / 1e6) < 0.002
    assert 0 < line["compute_ms"] < line["duration_ms"]
    assert line["batch_size"] == 1
