"""The package's face: names, where they say they live, and what importing it costs."""

import inspect
import pickle
import subprocess
import sys
import traceback

import pytest

import heatlens


def test_all_names_are_there():
    assert set(heatlens.__all__) <= set(dir(heatlens))
    for name in heatlens.__all__:
        assert getattr(heatlens, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Clint'"):
        heatlens.Clint  # noqa: B018 - looking is the test


def test_all_is_sorted():
    # Constants, then classes, then the rest, as ruff (RUF022) sorts.
    def key(name):
        return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)

    assert list(heatlens.__all__) == sorted(heatlens.__all__, key=key)


def test_names_say_heatlens():
    for name in set(heatlens.__all__) - {"__version__"}:
        assert getattr(heatlens, name).__module__ == "heatlens", name
    assert traceback.format_exception_only(heatlens.UnavailableError("gone")) == ["heatlens.UnavailableError: gone\n"]


def test_import_is_light():
    heavy = {"torch", "torchvision", "timm", "onnxruntime", "heatlens_server", "PIL", "scipy", "typer", "rich"}
    program = f"import sys, heatlens; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_stubs_load_without_the_clients():
    program = (
        "import sys, heatlens.v1.explain_pb2;"
        "ours = {name for name in sys.modules if name.startswith('heatlens.')};"
        "loaded = {name for name in ours if not name.startswith('heatlens.v1')};"
        "print(sorted(loaded | {'grpc', 'cv2', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['heatlens._version']"


def test_stubs_are_there_without_an_import_of_their_own():
    program = "import heatlens; print(heatlens.v1.explain_pb2.Image(), heatlens.v1.model_pb2_grpc.ModelServiceStub)"
    subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)


@pytest.mark.parametrize(
    "value", [heatlens.NotFoundError("no"), heatlens.PixelBox(0, 1, 2, 3), heatlens.Health.SERVING]
)
def test_values_travel_between_processes(value):
    assert repr(pickle.loads(pickle.dumps(value))) == repr(value)


def test_everything_has_a_docstring():
    for name in set(heatlens.__all__) - {"__version__"}:
        assert inspect.getdoc(getattr(heatlens, name)), name
