import copy
import pickle

import grpc
import pytest

import heatlens
from heatlens import FieldViolation, HeatlensError, InternalError, InvalidArgumentError, StatusCode
from heatlens._exceptions import __doc__ as tree
from heatlens._exceptions import error_class

ERRORS = [getattr(heatlens, name) for name in heatlens.__all__ if name.endswith("Error")]


def test_every_grpc_code_has_an_exception():
    assert {code.name for code in grpc.StatusCode} - {"OK"} == {code.value for code in StatusCode}
    for code in StatusCode:
        assert issubclass(error_class(code), HeatlensError)


@pytest.mark.parametrize("code", list(StatusCode))
def test_the_documented_table_is_true(code):
    (row,) = [
        line for line in tree.splitlines() if line.startswith("| ") and code.value in line.replace(",", "").split()
    ]
    assert error_class(code).__name__ in row


@pytest.mark.parametrize("error", ERRORS)
def test_every_exception_is_in_the_tree(error):
    assert issubclass(error, HeatlensError)
    assert f"* {error.__name__}" in tree
    if error is not HeatlensError:
        assert error_class(error("x").code) is error


def test_defaults():
    error = InternalError("broken")
    assert (str(error), error.code, error.reason) == ("broken", StatusCode.INTERNAL, "INTERNAL")
    assert (error.metadata, error.request_id, error.field_violations, error.retry_after_s) == ({}, None, (), None)


def test_wrong_argument_is_a_value_error():
    error = InvalidArgumentError.of("top_k", "expected 1")
    assert isinstance(error, ValueError)
    assert str(error) == "top_k: expected 1"
    assert error.field_violations == (FieldViolation("top_k", "expected 1"),)


@pytest.mark.parametrize("remake", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_survives_copies_and_process_borders(remake):
    error = heatlens.ResourceExhaustedError("full", reason="QUEUE_FULL", request_id="r", retry_after_s=0.5)
    again = remake(error)
    assert type(again) is type(error)
    assert vars(again) == vars(error)
    assert str(again) == "full"


def test_repr_names_reason_and_request():
    error = heatlens.NotFoundError("no model 'x'", reason="MODEL_NOT_FOUND", request_id="r-1")
    assert repr(error) == """NotFoundError("no model 'x'", reason='MODEL_NOT_FOUND', request_id='r-1')"""
