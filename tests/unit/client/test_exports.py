"""The package's face: names, where they say they live, and what importing it costs."""

import inspect
import subprocess
import sys
import traceback

import heatlens


def test_all_is_complete():
    # Modules are imported as a side effect of the import system; generated stubs live in heatlens.v1.
    public = {
        name for name, value in vars(heatlens).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public | {"__version__"} == set(heatlens.__all__)


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


def test_everything_has_a_docstring():
    for name in set(heatlens.__all__) - {"__version__"}:
        assert inspect.getdoc(getattr(heatlens, name)), name
