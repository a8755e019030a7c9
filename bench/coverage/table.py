"""The table as Markdown."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

MAX_MAP_DIFFERENCE = 1e-4
KNOWN = MAX_MAP_DIFFERENCE / 4
"""Maps that PyTorch misses by more, in float32, are not compared."""

_HEAD = """# What can be exported

Written by `make coverage-export` on {date}: {versions}; {machine}.

Every network has random weights (zeros drawn anew, batch norms fitted to four photos) and is exported to ONNX with any
batch size and any number of classes, as the server does it. The file is run by onnxruntime on three real photos
(large networks: one) with two classes each, sizes that were not traced, and judged by the network in float64 with
plain autograd. *Map* is the largest absolute difference of a Grad-CAM map in [0, 1] from the float64 map. Maps that
PyTorch itself misses by more than {known:g} in float32 are not compared, as float32 does not determine them: with
random weights the gradients that Grad-CAM averages, or the raw map's positive part, may cancel out almost. *Maps*
counts those compared and all; *torch* is the worst that PyTorch does on any of them.
*Nodes* and *seconds* are of the whole file, with all layers in it; seconds include tracing, differentiating,
translating and checking, on a busy machine.

{summary}
"""


def render(
    results: Sequence[Mapping[str, Any]],
    wanted: int,
    versions: Mapping[str, str],
    machine: str,
    date: datetime.date,
) -> str:
    """Make the page.

    Args:
        results: what `bench.coverage.measure` gave, in the table's order.
        wanted: how many networks there are to measure.
        versions: of the packages, by name.
        machine: what it ran on.
        date: when.
    """
    text = _HEAD.format(
        date=date,
        versions=", ".join(f"{name} {number}" for name, number in versions.items()),
        machine=machine,
        known=KNOWN,
        summary="\n".join(
            [
                *(
                    [f"**Not finished: {len(results)} of {wanted} networks are measured.**\n"]
                    if len(results) < wanted
                    else []
                ),
                *(_summary(results, library) for library in ("torchvision", "timm")),
            ]
        ),
    )
    for library in ("torchvision", "timm"):
        rows = [result for result in results if result["source"].startswith(f"{library}:")]
        text += f"\n## {library}\n\n"
        text += "| network | px | layer | map size | maps | map | torch | nodes | seconds |\n"
        text += "|---|---|---|---|---|---|---|---|---|\n"
        text += "".join(line for result in rows for line in _lines(result))
    return text


def compared(layer: Mapping[str, Any]) -> list[float]:
    """Differences of a layer's maps that float32 determines and that are not flat."""
    return [
        difference
        for difference, of_torch, steepness in zip(layer["map"], layer["torch"], layer["steepness"], strict=True)
        if steepness > 0 and of_torch <= KNOWN
    ]


def worst(result: Mapping[str, Any]) -> float:
    """The largest difference of a network's compared maps; 0 if there is none."""
    return max((difference for layer in result["layers"] for difference in compared(layer)), default=0.0)


def _summary(results: Sequence[Mapping[str, Any]], library: str) -> str:
    rows = [result for result in results if result["source"].startswith(f"{library}:")]
    exported = [result for result in rows if "reason" not in result]
    right = [result for result in exported if worst(result) <= MAX_MAP_DIFFERENCE]
    unknown = [result for result in exported if not any(compared(layer) for layer in result["layers"])]
    share = f"{100 * len(exported) / len(rows):.1f} %" if rows else "-"
    return (
        f"- {library}: {len(exported)} of {len(rows)} exported ({share}); every compared map of {len(right)} is within "
        f"{MAX_MAP_DIFFERENCE:g} of float64; {len(unknown)} have no map that float32 determines."
    )


def _lines(result: Mapping[str, Any]) -> list[str]:
    name = result["source"].partition(":")[2]
    if "reason" in result:
        return [f"| {name} | | not exported: {result['reason'].replace('|', '/')} | | | | | | |\n"]
    lines = []
    for position, layer in enumerate(result["layers"]):
        size = "x".join(str(side) for side in layer["shape"])
        known = compared(layer)
        cells = [
            f"`{layer['layer']}`",
            size,
            f"{len(known)}/{len(layer['map'])}",
            f"{max(known):.0e}" if known else "-",
            f"{max(layer['torch']):.0e}",
        ]
        first = position == 0
        before = [name, str(result["px"])] if first else ["", ""]
        after = [str(result["nodes"]), f"{result['seconds']:.0f}"] if first else ["", ""]
        lines.append("| " + " | ".join([*before, *cells, *after]) + " |\n")
    return lines
