"""Errors on their way from process to process."""

import pickle

import pytest

from heatlens_server.core import errors

EXAMPLES = [
    errors.InvalidArgument.of("options.layers[1]", "there is none", reason="INVALID_OPTION", layer="x"),
    errors.ModelNotFound("a", ["b", "c"]),
    errors.ModelInterrupted("a", "crashed", reason="MODEL_CRASHED", retry_after_s=0.5),
    errors.CompanionFailed("a", "no file"),
    errors.QueueFull("full", metadata={"max": "3"}, retry_after_s=1.0),
    errors.InternalError("it failed"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_is_the_same_in_another_process(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
