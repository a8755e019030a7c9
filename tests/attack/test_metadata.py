"""Metadata that no honest client sends: refused, and no token gets into the log."""

import grpc
import pytest

from heatlens.v1 import model_pb2, model_pb2_grpc
from raw_http2 import DATA, HEADERS, RawConnection, end_stream, frame, headers, message
from server_process import SETTLE_TIMEOUT_S, until
from server_toml import server_toml

TOKEN = "s3cret-token"
LIST_MODELS = "/heatlens.v1.ModelService/ListModels"


@pytest.fixture
def running(launch):
    return launch(server_toml(), env={"HEATLENS_SERVER__TOKEN": TOKEN})


def test_two_authorization_values_are_refused_whichever_is_right(running):
    good, bad = ("authorization", f"Bearer {TOKEN}"), ("authorization", "Bearer other")
    with grpc.insecure_channel(running.address) as channel:
        list_models = model_pb2_grpc.ModelServiceStub(channel).ListModels
        assert list_models(model_pb2.ListModelsRequest(), metadata=[good]).models
        for metadata in ([good, bad], [bad, good], [good, good]):
            with pytest.raises(grpc.RpcError) as refused:
                list_models(model_pb2.ListModelsRequest(), metadata=metadata)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert TOKEN not in running.log()


@pytest.mark.parametrize("name", ["authorization", "x_other"])
def test_metadata_that_is_no_utf_8_leaves_no_token_and_no_traceback_in_the_log(running, name):
    sent = {"authorization": f"Bearer {TOKEN}", name: f"Bearer {TOKEN}\udcff"}
    raw = RawConnection(running.address)
    raw.send(headers(1, LIST_MODELS, **sent), frame(DATA, 0, 1, message(b"")), end_stream(1))
    raw.until(HEADERS, 1)
    raw.socket.close()
    until(lambda: "ListModels" in running.log())
    running.process.terminate()
    assert running.process.wait(SETTLE_TIMEOUT_S) == 0
    assert ("UNAUTHENTICATED" in running.log()) == (name == "authorization")
    assert TOKEN not in running.log()
    assert "Traceback" not in running.log()
