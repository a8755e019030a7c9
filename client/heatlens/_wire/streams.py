"""Between a stream's values and protobuf: its configuration, its frames, and what the server answers."""

import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal, TypeAlias, Unpack

import numpy as np
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from heatlens._exceptions import HeatlensError, InternalError, InvalidArgumentError
from heatlens._results.images import ImageSource, encode_jpeg, is_file, is_rgb, load_image
from heatlens._results.results import Result
from heatlens._wire.answers import result_of
from heatlens._wire.arguments import MAX_SECONDS, as_float, checked_int, number_of
from heatlens._wire.names import OVERFLOW_POLICIES, REPLACEMENT_POLICIES
from heatlens._wire.requests import MapOptions, check_size, fill_image, model_name, version_name, write_options
from heatlens._wire.status import frame_error_of
from heatlens.v1 import explain_pb2

OverflowName = Literal["block", "drop-oldest"]
OnReplaceName = Literal["finish", "end"]
CaptureTime: TypeAlias = datetime | float

_MAX_FPS = 1e9
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# google.protobuf.Timestamp: from the year 1 up to, not including, the year 10000.
_MIN_TIMESTAMP_S = -62_135_596_800
_END_TIMESTAMP_S = 253_402_300_800


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """What a stream was asked for. Made by `stream_plan`.

    Attributes:
        config: the first message's content.
        drop_oldest: whether frames may be dropped (overflow="drop-oldest").
        every: the server explains the first of so many frames.
        jpeg_quality: pixels travel as JPEG of this quality; None: as they are.
        resume: whether a stream that breaks goes on by another call.
        placed: whether maps of the source image's size were asked for.
        max_message_bytes: largest message.
    """

    config: explain_pb2.StreamConfig
    drop_oldest: bool
    every: int
    jpeg_quality: int | None
    resume: bool
    placed: bool
    max_message_bytes: int


@dataclass(frozen=True, slots=True)
class Started:
    """The server admitted the stream.

    Attributes:
        window: the window in force, in frames.
        model: name of the model that answers.
        model_version: its version.
    """

    window: int
    model: str
    model_version: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The server's answer for one frame; of `result`, `error` and `skipped`, one is set."""

    frame_id: int
    result: Result | None = None
    error: HeatlensError | None = None
    skipped: bool = False


class StreamOptions(MapOptions, total=False):
    """What `Client.stream` takes besides, which documents it."""

    max_in_flight: int | None
    overflow: OverflowName
    every: int
    max_fps: float | None
    smooth: float
    frame_timeout: float | None
    jpeg_quality: int | None
    on_replace: OnReplaceName
    resume: bool


def stream_plan(
    caller: str = "Client.stream",
    /,
    *,
    max_message_bytes: int,
    model: str | None = None,
    version: str | None = None,
    max_in_flight: int | None = None,
    overflow: str = "block",
    every: int = 1,
    max_fps: float | None = None,
    smooth: float = 0.0,
    frame_timeout: float | None = None,
    jpeg_quality: int | None = None,
    on_replace: str = "finish",
    resume: bool = False,
    **options: Unpack[MapOptions],
) -> StreamPlan:
    """Check a stream's arguments, which `Client.stream` documents. `caller` is the function called, for errors.

    Raises:
        InvalidArgumentError: an argument is wrong; names it.
        TypeError: there is no option of that name.
    """
    for name, value, known in (
        ("overflow", overflow, OVERFLOW_POLICIES),
        ("on_replace", on_replace, REPLACEMENT_POLICIES),
    ):
        if value is None:
            raise InvalidArgumentError.of(name, f"expected one of {', '.join(known)}; got None")
    if not isinstance(resume, bool):
        raise InvalidArgumentError.of("resume", f"expected True or False, got {resume!r}")
    weight = as_float(smooth)
    # The wire has 32 bits for it: what rounds to 1 there would never move.
    if not (0 <= weight < 1 and np.float32(weight) < 1):
        raise InvalidArgumentError.of("smooth", f"expected a number in [0, 1), got {smooth!r}")
    frames_per_s = 0.0 if max_fps is None else as_float(max_fps)
    if max_fps is not None and not 0 < frames_per_s <= _MAX_FPS:
        raise InvalidArgumentError.of(
            "max_fps", f"expected a number > 0 and <= {_MAX_FPS:g}, or None for no limit; got {max_fps!r}"
        )
    config = explain_pb2.StreamConfig(
        model=model_name(model),
        model_version=version_name(version),
        overflow_policy=number_of("overflow", overflow, OVERFLOW_POLICIES),
        max_in_flight=0 if max_in_flight is None else checked_int("max_in_flight", max_in_flight, at_least=1),
        explain_every=checked_int("every", every, at_least=1),
        max_frames_per_second=frames_per_s,
        temporal_smoothing=weight,
        replacement_policy=number_of("on_replace", on_replace, REPLACEMENT_POLICIES),
    )
    write_options(config.options, options, known=MapOptions.__optional_keys__, caller=caller)
    if frame_timeout is not None:
        config.frame_timeout.CopyFrom(_frame_timeout(frame_timeout))
    return StreamPlan(
        config=config,
        drop_oldest=config.overflow_policy == explain_pb2.OVERFLOW_POLICY_DROP_OLDEST,
        every=config.explain_every,
        jpeg_quality=(
            None if jpeg_quality is None else checked_int("jpeg_quality", jpeg_quality, at_least=1, at_most=100)
        ),
        resume=resume,
        placed=config.options.map_size == explain_pb2.MAP_SIZE_SOURCE,
        max_message_bytes=max_message_bytes,
    )


def config_request(plan: StreamPlan) -> explain_pb2.StreamExplainRequest:
    """Build the first message."""
    return explain_pb2.StreamExplainRequest(config=plan.config)


def frame_request(
    plan: StreamPlan,
    frame: ImageSource,
    frame_id: int,
    *,
    captured: Timestamp | None,
    skipped: bool,
) -> explain_pb2.StreamExplainRequest:
    """Build the message of a frame. May take milliseconds: it reads files and encodes JPEGs.

    Args:
        plan: the stream's.
        frame: an image, as for `load_image`; uint8 RGB pixels become a JPEG if the plan says so.
        frame_id: its id.
        captured: when it was captured.
        skipped: the server will not explain it, so its image is neither read nor sent.

    Raises:
        InvalidArgumentError: the frame is no image source, or larger than a message may be.
        FileNotFoundError: there is no such file (another OSError if it cannot be read).
    """
    request = explain_pb2.StreamExplainRequest()
    request.frame.frame_id = frame_id
    if captured is not None:
        request.frame.capture_time.CopyFrom(captured)
    if not skipped:
        loaded = load_image(frame, argument="frame")
        # A JPEG holds nothing but 8-bit colours.
        if plan.jpeg_quality is not None and is_rgb(loaded):
            loaded = encode_jpeg(loaded, plan.jpeg_quality, argument="frame")
        fill_image(request.frame.image, loaded)
    check_size(request, plan.max_message_bytes, argument="frame")
    return request


def takes_time(plan: StreamPlan, frame: ImageSource, *, skipped: bool) -> bool:
    """Whether `frame_request` reads a file or encodes a JPEG, for callers that must not block."""
    return not skipped and not (
        isinstance(frame, bytes) or (isinstance(frame, np.ndarray) and plan.jpeg_quality is None)
    )


def refusal_of(error: HeatlensError | OSError) -> HeatlensError:
    """Return as a value, for `map`, what `frame_request` raised: a file that cannot be read is a wrong frame."""
    if isinstance(error, HeatlensError):
        return error
    refusal = InvalidArgumentError.of("frame", f"cannot be read: {error}", reason="IMAGE_UNREADABLE")
    refusal.__cause__ = error
    return refusal


def check_frames(frames: object, *kinds: type) -> None:
    """Check what `map` was given, as far as one can tell without pulling.

    Args:
        frames: what should yield frames.
        kinds: the kinds of iterables that are allowed.

    Raises:
        InvalidArgumentError: not iterable, or a single frame.
    """
    single = (
        isinstance(frames, str | bytes | bytearray | memoryview)
        or is_file(frames)
        or (isinstance(frames, np.ndarray) and frames.ndim != 4)
    )
    if single or not isinstance(frames, kinds):
        raise InvalidArgumentError.of(
            "frames", f"expected an iterable of images, got {'a single ' if single else ''}{type(frames).__name__}"
        )


def answer_of(response: explain_pb2.StreamExplainResponse, plan: StreamPlan, request_id: str) -> Started | Answer:
    """Read a message of the server.

    A result that breaks the contract is that frame's error.

    Raises:
        InternalError: the message holds nothing that this client knows (reason INVALID_RESPONSE).
    """
    kind = response.WhichOneof("payload")
    if kind == "result":
        try:
            return Answer(response.frame_id, result=result_of(response.result, placed=plan.placed))
        except InternalError as error:
            error.request_id = request_id
            return Answer(response.frame_id, error=error)
    if kind == "error":
        return Answer(response.frame_id, error=frame_error_of(response.error, request_id))
    if kind == "skipped":
        return Answer(response.frame_id, skipped=True)
    if kind == "started":
        started = response.started
        return Started(started.max_in_flight, started.model, started.model_version)
    raise InternalError(
        f"the server answered frame {response.frame_id} with nothing that this client knows",
        reason="INVALID_RESPONSE",
        request_id=request_id,
    )


def timestamp_of(capture_time: CaptureTime | None) -> Timestamp | None:
    """Return a time as sent.

    Args:
        capture_time: a datetime with a time zone, or seconds since 1970 (UTC).

    Raises:
        InvalidArgumentError: neither, or not in the years 1 to 9999.
    """
    if capture_time is None:
        return None
    if isinstance(capture_time, datetime):
        if capture_time.tzinfo is None or capture_time.utcoffset() is None:
            raise InvalidArgumentError.of("capture_time", "expected a datetime with a time zone, got one without")
        # In whole microseconds: float seconds would lose some.
        total_us = (capture_time - _EPOCH) // timedelta(microseconds=1)
        return Timestamp(seconds=total_us // 1_000_000, nanos=total_us % 1_000_000 * 1000)
    total_s = as_float(capture_time)
    if not _MIN_TIMESTAMP_S <= total_s < _END_TIMESTAMP_S:
        raise InvalidArgumentError.of(
            "capture_time", f"expected a datetime, or seconds since 1970 in the years 1 to 9999; got {capture_time!r}"
        )
    seconds = math.floor(total_s)
    return Timestamp(seconds=seconds, nanos=min(int((total_s - seconds) * 1e9), 999_999_999))


def _frame_timeout(timeout: float) -> Duration:
    timeout_s = as_float(timeout)
    if not 0 < timeout_s <= MAX_SECONDS:
        raise InvalidArgumentError.of(
            "frame_timeout", f"expected seconds > 0 and <= {MAX_SECONDS:g}, or None for no limit; got {timeout!r}"
        )
    # At least a nanosecond: 0 would not be a timeout.
    total_ns = max(1, round(timeout_s * 1e9))
    return Duration(seconds=total_ns // 1_000_000_000, nanos=total_ns % 1_000_000_000)
