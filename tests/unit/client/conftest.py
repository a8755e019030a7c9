"""A scripted gRPC server, and both clients with the same asynchronous methods."""

import signal
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from google.protobuf import any_pb2
from google.rpc import status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from heatlens import AsyncClient, Client
from heatlens.v1 import explain_pb2, explain_pb2_grpc, model_pb2, model_pb2_grpc
from stream_adapters import SyncClientAdapter
from stream_script import StreamScript


def answer(values=((0.0, 0.5), (0.25, 1.0)), **fields):
    """An ExplainResponse with one float32 map."""
    values = np.asarray(values, "<f4")
    return explain_pb2.ExplainResponse(
        explanations=[
            explain_pb2.Explanation(
                class_id=3,
                label="cat",
                logit=2.5,
                probability=0.75,
                map=explain_pb2.Tensor(
                    data_type=explain_pb2.DATA_TYPE_FLOAT32, shape=values.shape, data=values.tobytes()
                ),
                map_scale=2.0,
                map_offset=1.0,
            )
        ],
        source_region=explain_pb2.PixelBox(left=0, top=0, right=4, bottom=4),
        model="tiny",
        model_version="1",
        **fields,
    )


def failure(code, message="no", *details, trailing=()):
    """A reply that fails the call with a google.rpc.Status and trailing metadata."""

    def reply(request, context):
        packed = []
        for detail in details:
            packed.append(any_pb2.Any())
            packed[-1].Pack(detail)
        status = rpc_status.to_status(status_pb2.Status(code=code.value[0], message=message, details=packed))
        # abort_with_status replaces trailing metadata set before: both go in one tuple.
        context.set_trailing_metadata((*trailing, *status.trailing_metadata))
        context.abort(code, message)

    return reply


class Peer(explain_pb2_grpc.ExplainServiceServicer, model_pb2_grpc.ModelServiceServicer):
    """Answers Explain from `replies` (the last one for ever) and records what it was sent."""

    def __init__(self):
        self.replies = deque([answer()])
        self.models = model_pb2.ListModelsResponse()
        self.info = model_pb2.GetServerInfoResponse()
        self.requests = []
        self.metadata = []
        self.streams = StreamScript()
        self.address = ""

    def Explain(self, request, context):
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        reply = self.replies.popleft() if len(self.replies) > 1 else self.replies[0]
        return reply(request, context) if callable(reply) else reply

    answer = staticmethod(answer)
    failure = staticmethod(failure)

    def fail(self, code, message="no", *details, trailing=(), times=1):
        """Fail the next `times` calls."""
        self.replies.extendleft([failure(code, message, *details, trailing=trailing)] * times)

    def StreamExplain(self, request_iterator, context):
        return self.streams(request_iterator, context)

    def ListModels(self, request, context):
        return self.models

    def GetServerInfo(self, request, context):
        return self.info

    def LoadModel(self, request, context):
        self.requests.append(request)
        return model_pb2.LoadModelResponse()


@pytest.fixture
def peer():
    peer = Peer()
    peer.health = health.HealthServicer()
    peer.health.set("", health_pb2.HealthCheckResponse.SERVING)
    server = grpc.server(
        ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 32 << 20)]
    )
    explain_pb2_grpc.add_ExplainServiceServicer_to_server(peer, server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(peer, server)
    health_pb2_grpc.add_HealthServicer_to_server(peer.health, server)
    peer.server = server
    peer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield peer
    server.stop(0).wait()


@pytest.fixture(params=["sync", "async"])
async def connect(request, peer):
    """Makes clients of the peer (or of another address), closed at the end."""
    made = []

    def make(address=None, **options):
        kind = Client if request.param == "sync" else AsyncClient
        client = kind(address or peer.address, **options)
        made.append(SyncClientAdapter(client) if request.param == "sync" else client)
        return made[-1]

    yield make
    for client in made:
        await client.close()


@pytest.fixture
def ctrl_c_interrupts():
    """SIGINT raises KeyboardInterrupt here, even if the tests were started in the background, where it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def pixels():
    return np.random.default_rng(7).integers(0, 256, (4, 4, 3), dtype=np.uint8)
