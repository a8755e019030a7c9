"""The order of rooms: a room imports only itself and rooms before it. docs/architecture.md says what each is for."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "server" / "heatlens_server"
CLIENT = ROOT / "client" / "heatlens"
MAX_LINES = 450

ROOMS = (
    "core",
    "config",
    "imaging",
    "maps",
    "backends.onnx",
    "backends.torch",
    "telemetry",
    "scheduling",
    "fleet",
    "api",
    "transports",
)
"""From the ground up. The modules beside them (app, cli, ...) stand on top."""


def imports_of(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it: "a" and "a.b" for `from a import b`, which may be a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def room_of(module: str) -> int:
    """The floor of a module of the server; the top floor for those in no room."""
    return next((i for i, room in enumerate(ROOMS) if within(module, f"heatlens_server.{room}")), len(ROOMS))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_before_it(room):
    files = sorted((SERVER / room.replace(".", "/")).rglob("*.py"))
    assert files
    upward = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name in imports_of(path)
        if within(name, "heatlens_server") and name.count(".") > 1 and room_of(name) > ROOMS.index(room)
    ]
    assert upward == []


def test_only_the_top_and_the_client_stand_outside_of_the_rooms():
    assert {path.name for path in SERVER.iterdir() if path.is_dir()} - {"__pycache__"} == {
        room.partition(".")[0] for room in ROOMS
    }


LIBRARIES = {
    ("torch", "torchvision", "timm", "safetensors"): {"backends.torch", "fleet"},
    ("onnxruntime",): {"backends.onnx"},
    ("array_api_compat",): {"maps"},
    ("prometheus_client",): {"telemetry", "transports"},
    ("opentelemetry",): {"telemetry"},
    ("grpc", "grpc_health", "grpc_reflection", "grpc_status", "google", "heatlens"): {"transports"},
}
"""Who may import what from outside."""


@pytest.mark.parametrize("libraries", LIBRARIES)
def test_libraries_stay_in_their_rooms(libraries):
    rooms = {
        room
        for room in ROOMS
        for path in (SERVER / room.replace(".", "/")).rglob("*.py")
        for name in imports_of(path)
        if any(within(name, library) for library in libraries)
    }
    assert rooms <= LIBRARIES[libraries]


def test_core_needs_numpy_alone():
    names = {name.partition(".")[0] for path in (SERVER / "core").rglob("*.py") for name in imports_of(path)}
    assert names - sys.stdlib_module_names == {"numpy", "heatlens_server"}


def test_the_client_imports_nothing_of_the_server():
    names = {name.partition(".")[0] for path in CLIENT.rglob("*.py") for name in imports_of(path)}
    assert names & {"heatlens_server", "torch", "torchvision", "timm"} == set()


@pytest.mark.parametrize("room", [room for room in ROOMS if room != "backends.torch"])
def test_a_room_loads_neither_torch_nor_grpc_by_any_way(room):
    folder = SERVER / room.replace(".", "/")
    modules = [
        ".".join(path.relative_to(SERVER.parent).with_suffix("").parts)
        for path in sorted(folder.rglob("[a-z]*.py"))
        if path.stem != "export_process"
    ]
    unwanted = {"torch"} if room == "transports" else {"torch", "grpc", "heatlens"}
    program = f"import sys, {', '.join(modules)}; sys.exit(bool({unwanted} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_checks_see_trespassers(tmp_path):
    """These tests can fail: each way to import something is found, and every room has its floor."""
    (tmp_path / "bad.py").write_text("def f():\n    import torch.nn\n    from heatlens_server import api\n")
    assert list(imports_of(tmp_path / "bad.py")) == ["torch.nn", "heatlens_server", "heatlens_server.api"]
    assert not within("torchvision", "torch")
    assert room_of("heatlens_server.core.errors") < room_of("heatlens_server.api.plan") < room_of("heatlens_server.app")


def sources() -> list[Path]:
    folders = ("client", "server", "tests", "bench", "examples", "proto", "docs")
    found = [path for folder in folders for kind in ("*.py", "*.proto", "*.md") for path in (ROOT / folder).rglob(kind)]
    found += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile")]
    # What is generated, or not ours.
    others = {CLIENT / "v1", ROOT / "docs" / "proto.md", ROOT / "examples" / "node" / "node_modules"}
    return [path for path in found if others.isdisjoint({path, *path.parents})]


def test_no_file_is_too_long():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources()}
    assert len(lengths) > 70
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_no_file_is_a_drawer():
    drawers = {"utils.py", "util.py", "helpers.py", "manager.py", "common.py", "misc.py"}
    assert [path for path in sources() if path.name in drawers] == []
