"""The rooms of the client are in an order: each imports only itself and rooms before it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

CLIENT = Path(__file__).parents[3] / "client" / "heatlens"
ROOMS = [
    "v1",
    "_version",
    "_exceptions",
    "_results",
    "_wire",
    "_stream",
    "_calls",
    "_evaluation",
    "_video",
    "_batch",
    "_cli",
]


def imported_rooms(room: str) -> Iterator[str]:
    """Which rooms of the client a room imports, wherever in its files."""
    for path in sorted((CLIENT / room).rglob("*.py")) or [CLIENT / f"{room}.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            yield from (name.split(".")[1] for name in names if name.startswith("heatlens."))


@pytest.mark.parametrize("room", ROOMS)
def test_room_imports_only_rooms_before_it(room):
    assert set(imported_rooms(room)) <= set(ROOMS[: ROOMS.index(room) + 1])


def test_every_room_has_its_place():
    assert {path.parts[len(CLIENT.parts)].removesuffix(".py") for path in CLIENT.rglob("*.py")} == {*ROOMS, "__init__"}
