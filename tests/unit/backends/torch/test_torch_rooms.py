"""The order inside backends/torch: each entry imports only itself and entries before it."""

import ast
from pathlib import Path

import pytest

import heatlens_server.backends.torch

ROOT = Path(heatlens_server.backends.torch.__file__).parent
PREFIX = "heatlens_server.backends.torch."
ROOMS = (
    *("cam", "sources", "goals", "network", "passes"),
    *("stepping", "engine", "torchscript_engine", "export"),
)


def test_every_file_is_in_the_order():
    assert {path.stem for path in ROOT.iterdir()} - {"__init__", "__pycache__"} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_before_it(room):
    files = [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else sorted((ROOT / room).rglob("*.py"))
    imported = {
        node.module.removeprefix(PREFIX).partition(".")[0]
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module.startswith(PREFIX)
    }
    assert imported <= set(ROOMS[: ROOMS.index(room) + 1])
