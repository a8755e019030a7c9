"""A scripted StreamExplain: it answers when the test says so, and records what it was sent."""

import queue
import threading
import time

import grpc
import numpy as np
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from heatlens.v1 import explain_pb2 as pb

BAD = b"bad"


def frame_status(reason, code=code_pb2.INVALID_ARGUMENT, field="frame.image.encoded", request_id=""):
    """The google.rpc.Status of a failed frame."""
    status = status_pb2.Status(code=code, message=f"no: {reason}")
    details = [
        error_details_pb2.ErrorInfo(reason=reason, domain="heatlens"),
        error_details_pb2.BadRequest(
            field_violations=[error_details_pb2.BadRequest.FieldViolation(field=field, description="no")]
        ),
    ]
    if request_id:
        details.append(error_details_pb2.RequestInfo(request_id=request_id))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def result_for(frame):
    """A result that tells which frame it is for: the id is the class, the image's last byte the logit."""
    image = frame.image
    data = image.encoded or image.pixels.data
    values = np.asarray([[0.0, 0.5], [0.25, 1.0]], "<f4")
    tensor = pb.Tensor(data_type=pb.DATA_TYPE_FLOAT32, shape=values.shape, data=values.tobytes())
    return pb.ExplainResponse(
        explanations=[pb.Explanation(class_id=frame.frame_id % 2**31, logit=data[-1] if data else -1.0, map=tensor)],
        source_region=pb.PixelBox(right=4, bottom=4),
        model="tiny",
    )


def reply_to(frame, index, config):
    """What the contract asks for: left out frames are skipped, BAD ones fail alone."""
    answer = pb.StreamExplainResponse(frame_id=frame.frame_id)
    if config.explain_every > 1 and index % config.explain_every:
        answer.skipped.SetInParent()
    elif frame.image.encoded == BAD:
        answer.error.CopyFrom(frame_status("IMAGE_UNDECODABLE"))
    else:
        answer.result.CopyFrom(result_for(frame))
    return answer


def abort(context, code, reason):
    """End the stream with a rich status."""
    packed = any_pb2.Any()
    packed.Pack(error_details_pb2.ErrorInfo(reason=reason, domain="heatlens"))
    status = status_pb2.Status(code=code.value[0], message=f"no: {reason}", details=[packed])
    context.set_trailing_metadata(rpc_status.to_status(status).trailing_metadata)
    context.abort(code, f"no: {reason}")


class StreamScript:
    """Serves streams. `gate` holds answers back: `gate.clear()`, or `permits` for single ones.

    Attributes:
        window: what StreamStarted grants; None: what was asked for, or 4.
        reply: `reply(frame, index, config)` makes the answer; None: none at all.
        breaks: (count, code, reason): after so many answers the stream ends; a list of them: of each stream its own,
            and of those that follow none.
        refuses: (code, reason): no stream is started.
        starts: cleared: StreamStarted is not sent.
        frames: what arrived, of all streams, in order; `configs` likewise.
        open: streams that are open now.
        statuses: how streams ended: "finished" or "cancelled".
    """

    def __init__(self):
        self.window = None
        self.reply = reply_to
        self.breaks = self.refuses = None
        self.starts, self.gate = threading.Event(), threading.Event()
        self.starts.set()
        self.gate.set()
        self.permits = threading.Semaphore(0)
        self.frames, self.configs, self.statuses = [], [], []
        self.open = 0

    def __call__(self, requests, context):
        arrived = queue.SimpleQueue()

        def read():
            try:
                for request in requests:
                    if request.WhichOneof("payload") == "frame":
                        self.frames.append(request.frame)
                    arrived.put(request)
                arrived.put("finished")
            except Exception:
                arrived.put("cancelled")

        self.open += 1
        threading.Thread(target=read, daemon=True).start()
        # What gRPC leaves this generator with when the call is cancelled.
        status = "cancelled"
        try:
            status = yield from self.serve(arrived, context)
        finally:
            self.statuses.append(status)
            self.open -= 1

    def serve(self, arrived, context):
        first = arrived.get()
        if isinstance(first, str):
            return first
        assert first.WhichOneof("payload") == "config", first
        self.configs.append(first.config)
        if self.refuses:
            abort(context, *self.refuses)
        while not self.starts.wait(0.01):
            if not context.is_active():
                return "cancelled"
        window = self.window if self.window is not None else first.config.max_in_flight or 4
        yield pb.StreamExplainResponse(started=pb.StreamStarted(model="tiny", model_version="7", max_in_flight=window))
        count = 0
        own = [self.breaks.pop(0) if self.breaks else None] if isinstance(self.breaks, list) else None
        while True:
            breaks = own[0] if own else self.breaks
            if breaks and count == breaks[0]:
                abort(context, *breaks[1:])
            request = arrived.get()
            if isinstance(request, str):
                return request
            while not (self.gate.is_set() or self.permits.acquire(timeout=0.005)):
                if not context.is_active():
                    return "cancelled"
            answer = self.reply(request.frame, count, first.config)
            count += 1
            if answer is not None:
                yield answer

    def wait_for(self, condition, timeout_s=5.0):
        """Wait until `condition()`; fails after the timeout."""
        limit = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < limit, "it never happened"
            time.sleep(0.002)


def stays(condition, seconds=0.1):
    """Whether something is still so after a while."""
    time.sleep(seconds)
    return condition()


__all__ = ["BAD", "StreamScript", "abort", "frame_status", "grpc", "reply_to", "result_for", "stays"]
