"""Which of the open streams are told to end, and how many there may be."""

import contextlib
from types import SimpleNamespace

import pytest

from heatlens_server.api.stream.open_streams import OpenStreams
from heatlens_server.core.errors import ModelUnloaded, StreamLimit

MOST = 4


class Stream:
    def __init__(self, model: object, *, ends_when_replaced: bool) -> None:
        self.model, self.ends_when_replaced = model, ends_when_replaced
        self.errors: list[Exception] = []

    def end(self, error: Exception) -> None:
        self.errors.append(error)


def test_streams_of_one_model_end_all_of_them_or_those_that_asked_for_it():
    model, other = SimpleNamespace(), SimpleNamespace()
    stays, ends = (Stream(model, ends_when_replaced=asked) for asked in (False, True))
    elsewhere = Stream(other, ends_when_replaced=True)
    streams, error = OpenStreams(max_streams=3), ModelUnloaded.by_another("m")
    with contextlib.ExitStack() as admitted:
        for stream in (stays, ends, elsewhere):
            admitted.enter_context(streams.admit(stream))
        streams.end_streams_of(model, error, only_if_asked=True)
        assert (stays.errors, ends.errors) == ([], [error])
        streams.end_streams_of(model, error)
        assert (stays.errors, ends.errors) == ([error], [error, error])
    assert elsewhere.errors == []


def placed() -> Stream:
    return Stream(None, ends_when_replaced=False)


def opened(streams, stack, host, count):
    made = [placed() for _ in range(count)]
    for number, stream in enumerate(made):
        stack.enter_context(streams.admit(stream, f"ipv4:10.0.0.{host}:{number}"))
    return made


def test_the_newest_streams_of_the_host_that_has_most_end_for_those_of_others():
    streams = OpenStreams(max_streams=MOST)
    with contextlib.ExitStack() as stack:
        first = opened(streams, stack, 1, MOST)
        opened(streams, stack, 2, 2)
        assert [stream.errors != [] for stream in first] == [False, False, True, True]
        assert isinstance(first[-1].errors[0], StreamLimit)
        assert first[-1].errors[0].retry_after_s
        for host in (1, 2):
            with pytest.raises(StreamLimit), streams.admit(placed(), f"ipv4:10.0.0.{host}:9"):
                pass
    assert streams.counters.open == 0
    with contextlib.ExitStack() as stack:
        opened(streams, stack, 1, MOST)


def test_those_that_are_slow_to_end_do_not_add_up():
    streams = OpenStreams(max_streams=MOST)
    with contextlib.ExitStack() as stack:
        opened(streams, stack, 1, MOST)
        for host in range(2, 5 * MOST):
            with contextlib.suppress(StreamLimit):
                opened(streams, stack, host, 1)
    assert streams.counters.streams.created <= 2 * MOST


def test_one_host_has_all_places_while_it_is_alone():
    streams = OpenStreams(max_streams=MOST, host_of=lambda _peer: "")
    with contextlib.ExitStack() as stack:
        opened(streams, stack, 1, MOST)
        with pytest.raises(StreamLimit), streams.admit(placed(), "ipv4:10.0.0.2:1"):
            pass
