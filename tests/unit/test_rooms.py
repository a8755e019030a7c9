"""The house plan: which room may import what, and how long a file may be. docs/architecture.md has the table."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "server" / "heatlens_server"
CLIENT = ROOT / "client" / "heatlens"
MAX_LINES = 350

GRPC = ("grpc", "grpc_health", "grpc_reflection", "grpc_status", "google")
# heatlens.v1 is protobuf; the rest of the client is values and geometry.
WIRE = (*GRPC, "heatlens.v1")
TORCH = ("torch", "torchvision", "timm")
RULES = {
    "cam": (*GRPC, "heatlens", "heatlens_server"),
    "faithfulness": (*WIRE, "heatlens_server"),
    "engines": (*WIRE, *(f"heatlens_server.{room}" for room in ("rpc", "serving", "app", "building", "export"))),
    "export": (*WIRE, *(f"heatlens_server.{room}" for room in ("rpc", "serving", "app", "building", "engines"))),
    "building": (*WIRE, *(f"heatlens_server.{room}" for room in ("rpc", "serving", "app"))),
    "models": (*WIRE, "heatlens_server.rpc", "heatlens_server.serving", "heatlens_server.app"),
    "serving": (*TORCH, *WIRE, "heatlens_server.rpc", "heatlens_server.models", "heatlens_server.app"),
    "imaging": (*TORCH, *WIRE, *(f"heatlens_server.{room}" for room in ("rpc", "serving", "engines", "models", "app"))),
    "rpc": (*TORCH, "heatlens_server.engines", "heatlens_server.app"),
}
ALLOWED = {
    "cam": ("heatlens_server.cam",),
    "faithfulness": ("heatlens_server.cam", "heatlens_server.faithfulness"),
    # Engines run what exports hold; an export is verified by the engine that is everybody's reference.
    "engines": ("heatlens_server.export.spec", "heatlens_server.export.manifest"),
    "export": ("heatlens_server.engines.base", "heatlens_server.engines.torch_engine"),
    "rpc": ("heatlens_server.engines.base",),
    "serving": ("heatlens_server.engines.base",),
}


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


def trespasses(folder: Path, forbidden: tuple[str, ...], allowed: tuple[str, ...] = ()) -> list[str]:
    """The forbidden imports of a folder. A package is allowed as such where one of its modules is."""
    return [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted(folder.rglob("*.py"))
        for name in imports_of(path)
        if any(within(name, package) for package in forbidden) and not any(within(name, package) for package in allowed)
    ]


@pytest.mark.parametrize("room", RULES)
def test_room_keeps_to_its_imports(room):
    assert list((SERVER / room).glob("*.py"))
    assert trespasses(SERVER / room, RULES[room], ALLOWED.get(room, ())) == []


def test_serving_knows_engines_by_their_interface_only():
    assert trespasses(SERVER / "serving", ("heatlens_server.engines",), ("heatlens_server.engines.base",)) == []


def test_tasks_keep_torch_and_the_wire_apart():
    """One folder per task: what differentiates knows no protobuf, what reads requests knows no torch."""
    for path in sorted((SERVER / "tasks").rglob("*.py")):
        forbidden = (*TORCH, "heatlens_server.engines") if path.stem.startswith("wire") else WIRE
        found = [
            name
            for name in imports_of(path)
            if any(within(name, package) for package in forbidden) and not within(name, "heatlens_server.engines.base")
        ]
        assert [name for name in found if name != "heatlens_server.engines"] == [], path


def test_client_knows_nothing_of_the_server():
    assert trespasses(CLIENT, ("heatlens_server", *TORCH)) == []


def test_torch_is_where_the_plan_says():
    rooms = {
        path.relative_to(SERVER).parts[0]
        for path in SERVER.rglob("*.py")
        if any(within(name, package) for name in imports_of(path) for package in TORCH)
    }
    assert rooms <= {"building", "cam", "engines", "export", "faithfulness", "models", "tasks"}


@pytest.mark.parametrize("room", ["rpc", "serving", "imaging"])
def test_room_loads_no_torch_by_any_way(room):
    modules = [f"heatlens_server.{room}.{path.stem}" for path in (SERVER / room).glob("[a-z]*.py")]
    program = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    "module",
    [
        "engines.base",
        "engines.companion",
        "engines.onnxruntime_engine",
        "engines.providers",
        "export.manifest",
        "export.spec",
    ],
)
def test_what_serves_an_export_loads_no_torch(module):
    program = f"import sys, heatlens_server.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_checks_see_trespassers(tmp_path):
    """These tests can fail: each way to import something is found."""
    (tmp_path / "bad.py").write_text("def f():\n    import torch.nn\n    from heatlens_server import rpc\n")
    assert list(imports_of(tmp_path / "bad.py")) == ["torch.nn", "heatlens_server", "heatlens_server.rpc"]
    assert within("torch.nn", "torch")
    assert not within("torchvision", "torch")


def sources() -> list[Path]:
    folders = ("client", "server", "tests", "bench", "examples", "proto", "docs")
    found = [path for folder in folders for kind in ("*.py", "*.proto", "*.md") for path in (ROOT / folder).rglob(kind)]
    found += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Makefile")]
    return [path for path in found if CLIENT / "v1" not in path.parents]


def test_no_file_is_too_long():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources()}
    assert len(lengths) > 70
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_no_file_is_a_drawer():
    drawers = {"utils.py", "util.py", "helpers.py", "manager.py", "common.py", "misc.py"}
    assert [path for path in sources() if path.name in drawers] == []
