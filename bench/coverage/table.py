"""The table as Markdown."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

MAX_MAP_DIFFERENCE = 1e-4

_HEAD = """# What can be exported

Written by `make coverage-export` on {date}: {versions}; {machine}.

Every network has random weights (zeros drawn anew, batch norms fitted to four photos) and is exported to ONNX with any
batch size and any number of classes, as the server does it. The file is run by onnxruntime on three real photos
(large networks: one) with two classes each, sizes that were not traced, and judged by the network in float64 with
plain autograd. *Map* is the largest absolute difference of a Grad-CAM map in [0, 1] from the float64 map; *torch* is
what PyTorch itself differs by in float32. A map that is flat in float64 proves nothing: *maps* counts the others.
*Nodes* and *seconds* are of the whole file, with all layers in it; seconds include tracing, differentiating,
translating and checking, on a busy machine.

{summary}
"""


def render(results: Sequence[Mapping[str, Any]], versions: Mapping[str, str], machine: str, date: datetime.date) -> str:
    """Make the page.

    Args:
        results: what `bench.coverage.measure` gave, in the table's order.
        versions: of the packages, by name.
        machine: what it ran on.
        date: when.
    """
    text = _HEAD.format(
        date=date,
        versions=", ".join(f"{name} {number}" for name, number in versions.items()),
        machine=machine,
        summary="\n".join(_summary(results, library) for library in ("torchvision", "timm")),
    )
    for library in ("torchvision", "timm"):
        rows = [result for result in results if result["source"].startswith(f"{library}:")]
        text += f"\n## {library}\n\n"
        text += "| network | px | layer | map size | maps | map | torch | nodes | seconds |\n"
        text += "|---|---|---|---|---|---|---|---|---|\n"
        text += "".join(line for result in rows for line in _lines(result))
    return text


def worst(result: Mapping[str, Any]) -> float:
    """The largest map difference of a network's layers."""
    return max((layer["map"] for layer in result["layers"]), default=float("inf"))


def _summary(results: Sequence[Mapping[str, Any]], library: str) -> str:
    rows = [result for result in results if result["source"].startswith(f"{library}:")]
    exported = [result for result in rows if "reason" not in result]
    right = [result for result in exported if worst(result) <= MAX_MAP_DIFFERENCE]
    share = f"{100 * len(exported) / len(rows):.1f} %" if rows else "-"
    return (
        f"- {library}: {len(exported)} of {len(rows)} exported ({share}), {len(right)} of them with every map within "
        f"{MAX_MAP_DIFFERENCE:g} of float64."
    )


def _lines(result: Mapping[str, Any]) -> list[str]:
    name = result["source"].partition(":")[2]
    if "reason" in result:
        return [f"| {name} | | not exported: {result['reason'].replace('|', '/')} | | | | | | |\n"]
    lines = []
    for position, layer in enumerate(result["layers"]):
        first = position == 0
        size = "x".join(str(side) for side in layer["shape"])
        lines.append(
            f"| {name if first else ''} | {result['px'] if first else ''} | `{layer['layer']}` | {size} "
            f"| {layer['informative']} | {layer['map']:.0e} | {layer['torch']:.0e} "
            f"| {result['nodes'] if first else ''} | {result['seconds']:.0f} |\n"
            if first
            else f"| | | `{layer['layer']}` | {size} | {layer['informative']} | {layer['map']:.0e} "
            f"| {layer['torch']:.0e} | | |\n"
        )
    return lines
