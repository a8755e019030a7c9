"""The table as Markdown."""

import datetime
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from heatlens_server.backends.torch.export.reference import MOVES

MAX_MAP_DIFFERENCE = 1e-4
KNOWN = MAX_MAP_DIFFERENCE / 4
"""Maps that PyTorch misses by more, in float32, are not compared."""

_HEAD = """# What can be exported

Written by `make coverage-export` on {date}: {versions}; {machine}.

Every network has random weights (zeros drawn anew, batch norms fitted to four photos) and is exported as servers do it:
the forward pass, and its backward passes by the default layer and one in the middle. onnxruntime runs them on three
real photos with two classes each (large networks: one photo, the two largest: one class), sizes that were not traced.
They are judged by the network in float64 with plain autograd. *Difference* is the largest absolute difference of a
Grad-CAM map in [0, 1] from the float64 map, *maps* counts those compared and all.

Maps that PyTorch itself misses by more than {known:g} in float32 are not compared, as float32 does not determine them:
with random weights the gradients that Grad-CAM averages, or the raw map's positive part, may cancel out almost, and a
ReLU whose input is zero but for rounding switches a part of the gradient on or off. Where a map differs by more than
{bound:g} all the same, PyTorch is asked {moves} more times with every weight moved by at most two units in the last
place: a map that such a move changes by more than {known:g} is not determined either.

*Nodes* are of the forward pass and both backward passes; *CPU s* is from the network to graphs that are open, without
verification.

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
        bound=MAX_MAP_DIFFERENCE,
        moves=MOVES,
        summary="\n".join(
            [
                *(
                    [f"**Not finished: {len(results)} of {wanted} networks are measured.**\n"]
                    if len(results) < wanted
                    else []
                ),
                *(_summary(results, library) for library in ("torchvision", "timm")),
                _all_maps(results),
            ]
        ),
    )
    for library in ("torchvision", "timm"):
        rows = [result for result in results if result["source"].startswith(f"{library}:")]
        text += f"\n## {library}\n\n"
        text += "| network | px | default layer | maps | difference | middle layer | maps | difference "
        text += "| nodes | CPU s |\n"
        text += f"{'|---' * 10}|\n"
        text += "".join(_line(result) for result in rows)
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


def _all_maps(results: Sequence[Mapping[str, Any]]) -> str:
    maps = [
        (difference, of_torch)
        for result in results
        for layer in result.get("layers", ())
        for difference, of_torch, steepness in zip(layer["map"], layer["torch"], layer["steepness"], strict=True)
        if steepness > 0
    ]
    within = sum(difference <= MAX_MAP_DIFFERENCE for difference, _ in maps)
    unknown = [difference / of_torch for difference, of_torch in maps if of_torch > KNOWN]
    return (
        f"- all {len(maps)} maps that are not flat: {len(maps) - len(unknown)} compared, {within} within "
        f"{MAX_MAP_DIFFERENCE:g}; of those not compared, onnxruntime's difference is {statistics.median(unknown):.2f} "
        "times PyTorch's in the median."
    )


def _line(result: Mapping[str, Any]) -> str:
    name = result["source"].partition(":")[2]
    if "reason" in result:
        return f"| {name} | | not exported: {result['reason'].replace('|', '/')} {'| ' * 7}|\n"
    cells = [name, str(result["px"])]
    for layer in result["layers"]:
        known = compared(layer)
        size = "x".join(str(side) for side in layer["shape"])
        cells += [
            f"`{layer['layer']}` {size}",
            f"{len(known)}/{len(layer['map'])}",
            f"{max(known):.0e}" if known else "-",
        ]
    if len(result["layers"]) == 1:
        cells += [""] * 3
    return f"| {' | '.join(cells)} | {result['nodes']} | {result['seconds']:.1f} |\n"
