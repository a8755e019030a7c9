"""Marks what the package offers."""

from typing import Any, TypeVar

Item = TypeVar("Item", bound=Any)


def public(item: Item) -> Item:
    """Return a class or function that tracebacks, reprs and pickles name as `heatlens.NAME`, wherever it is written."""
    item.__module__ = "heatlens"
    return item
