"""Which of the open streams are told to end."""

import contextlib
from types import SimpleNamespace

from heatlens_server.api.stream.open_streams import OpenStreams
from heatlens_server.core.errors import ModelUnloaded


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
