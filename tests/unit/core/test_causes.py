"""What the operator reads of an error: its causes, and the place in code that is not ours."""

import importlib.util
import json

import pytest
import torch

from heatlens_server.core.causes import with_causes
from heatlens_server.core.errors import ModelLoadError

NET = """
import json

def fails():
    raise OSError("no weights")

def fails_in_a_library():
    json.loads("{")
"""


@pytest.fixture
def net(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    spec = importlib.util.spec_from_file_location("net_of_this_test", tmp_path / "net.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def caught(function, message="it failed"):
    try:
        function()
    except Exception as error:
        failed = ModelLoadError(message)
        failed.__cause__ = error
        return failed
    raise AssertionError("nothing was raised")


def test_the_cause_and_the_line_that_raised_it(net):
    assert with_causes(caught(net.fails)) == f"it failed; OSError: no weights ({net.__file__}, line 5, in fails)"


def test_the_line_of_ones_own_that_called_a_library(net):
    found = with_causes(caught(net.fails_in_a_library))
    assert found.startswith("it failed; JSONDecodeError: Expecting property name")
    assert found.endswith(f"({net.__file__}, line 8, in fails_in_a_library)")


def test_every_cause_of_a_chain(net):
    error = caught(lambda: (_ for _ in ()).throw(caught(net.fails, "inner")), "outer")
    assert with_causes(error).startswith("outer; ModelLoadError: inner; OSError: no weights (")
    assert with_causes(error).endswith("line 5, in fails)")


def test_what_an_error_repeats_of_ours_is_said_once():
    inner = ModelLoadError("no scores")
    inner.__cause__ = OSError("no file")
    outer = ModelLoadError("no scores; set output")
    outer.__cause__ = inner
    assert with_causes(outer) == "no scores; set output; OSError: no file"


def test_an_error_of_ours_alone_has_no_place():
    assert with_causes(ModelLoadError("no such layer")) == "no such layer"


def test_notes_are_told():
    error = ModelLoadError("it failed")
    error.add_note("OSError: no weights (net.py, line 5, in fails)")
    assert with_causes(error) == "it failed; OSError: no weights (net.py, line 5, in fails)"


def test_a_long_cause_is_cut():
    module = torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(1000)))
    error = caught(lambda: module.load_state_dict({}))
    assert 2000 < len(with_causes(error)) < 2300


def test_libraries_are_no_place_of_ones_own():
    told = with_causes(caught(lambda: json.loads("{")))
    assert "/json/" not in told
    assert f"({__file__}, line " in told
