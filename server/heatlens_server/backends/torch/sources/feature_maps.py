"""Which of a network's outputs can be explained: feature maps, channels-last maps and tokens that fit the image."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn

from heatlens_server.backends.torch.cam.grid import MAP, Grid, Layout
from heatlens_server.backends.torch.sources.trace import Trace

# Their output is their input, so they are no place of their own.
_TRANSPARENT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
# Class, distillation and register tokens before the grid: more of them are a misreading.
_MOST_PREFIX = 8
_ATTENTION_TYPE = re.compile(r"att(entio)?n")
_ATTENTION_NAMES = frozenset({"attn", "attention", "self_attn", "self_attention"})


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layer that may be explained.

    Attributes:
        trace: its run.
        grid: how its output is read as a map.
    """

    trace: Trace
    grid: Grid

    @property
    def name(self) -> str:
        """The module's name."""
        return self.trace.name

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the map."""
        if self.grid.layout is Layout.TOKENS:
            return self.grid.height, self.grid.width
        first = 2 if self.grid.layout is Layout.MAP else 1
        return self._sizes[first], self._sizes[first + 1]

    @property
    def height(self) -> int:
        """Rows of the map."""
        return self.size[0]

    @property
    def channels(self) -> int:
        """Channels of the map."""
        return self._sizes[1 if self.grid.layout is Layout.MAP else -1]

    @property
    def _sizes(self) -> tuple[int, ...]:
        return self.trace.shape or (0, 0, 0, 0)


def map_candidates(traces: Sequence[Trace], input_size: tuple[int, int], class_count: int) -> list[Candidate]:
    """The feature maps (1, C, h, w), in order of execution.

    Left out are adaptive pooling and pooling to a line (the layer before it is finer or the same), maps that already
    are class scores (as many channels as classes, and nothing with parameters after them: SqueezeNet's classifier),
    whatever lies inside an attention module, and modules that run more than once.
    """
    attention = tuple(f"{trace.name}." for trace in traces if _is_attention(trace.module))
    found = [
        Candidate(trace, MAP)
        for trace in traces
        if is_feature_map(trace.shape, input_size)
        and not _is_attention(trace.module)
        and not trace.name.startswith(attention)
    ]
    return _fit(found, traces, class_count)


def token_candidates(traces: Sequence[Trace], input_size: tuple[int, int], class_count: int) -> list[Candidate]:
    """The channels-last maps, and tokens that fit the image, in order of execution.

    Left out is the same as there, and linear layers, whose outputs are mostly parts of an attention or hidden layers,
    unless there is nothing else.
    """
    grids = seen_grids(traces, input_size)
    inside = _inside_attention(traces)
    found = [
        Candidate(trace, grid)
        for trace in traces
        if trace.order not in inside
        and (grid := grid_of(trace.shape, input_size, grids)) is not None
        and grid.layout is not Layout.MAP
    ]
    fit = _fit(found, traces, class_count)
    return [candidate for candidate in fit if not isinstance(candidate.trace.module, nn.Linear)] or fit


def unread_tokens(traces: Sequence[Trace], input_size: tuple[int, int]) -> list[Trace]:
    """What looks like tokens, but fits no grid of the image."""
    grids = seen_grids(traces, input_size)
    inside = _inside_attention(traces)
    return [
        trace
        for trace in traces
        if trace.order not in inside
        and trace.shape is not None
        and len(trace.shape) == 3
        and trace.shape[0] == 1
        and min(trace.shape[1:]) > 1
        and grid_of(trace.shape, input_size, grids) is None
    ]


def is_line(shape: tuple[int, ...] | None) -> bool:
    """Whether a shape is that of a map one pixel high or wide, whatever the input's proportions: (1, C, 1, w)."""
    return shape is not None and len(shape) == 4 and shape[0] == 1 and min(shape[2:]) == 1 < max(shape[2:])


def grid_of(
    shape: tuple[int, ...] | None, input_size: tuple[int, int], grids: Collection[tuple[int, int]]
) -> Grid | None:
    """How an output of this shape is read as a map; None if it cannot be.

    Tokens (1, T, C) are laid on one of the grids, with the fewest tokens before it: T - h * w, at most 8 and less than
    half as many as on it. Where the network shows no grid at all, on one that divides the input into whole patches.
    """
    if shape is None or shape[:1] != (1,):
        return None
    if is_feature_map(shape, input_size):
        return MAP
    if len(shape) == 4 and is_feature_map((1, shape[3], *shape[1:3]), input_size):
        return Grid(Layout.CHANNELS_LAST)
    if len(shape) != 3 or shape[2] < 2:
        return None
    choices = grids or _patchings(input_size)
    fitting = [
        (prefix, h, w) for h, w in choices if 0 <= (prefix := shape[1] - h * w) <= _MOST_PREFIX and 2 * prefix < h * w
    ]
    if not fitting:
        return None
    prefix, height, width = min(fitting)
    return Grid(Layout.TOKENS, prefix, height, width)


def seen_grids(traces: Sequence[Trace], input_size: tuple[int, int]) -> set[tuple[int, int]]:
    """The sizes (h, w) > 1 of the maps of a run, and those, halved, that pooled tokens have."""
    inside = _inside_attention(traces)
    grids: set[tuple[int, int]] = set()
    for trace in traces:
        grid = grid_of(trace.shape, input_size, ()) if trace.order not in inside else None
        if grid is None or trace.shape is None or grid.layout is Layout.TOKENS:
            continue
        height, width = trace.shape[2:] if grid.layout is Layout.MAP else trace.shape[1:3]
        while min(height, width) > 1:
            grids.add((height, width))
            height, width = (height + 1) // 2, (width + 1) // 2
    return grids


def is_feature_map(shape: tuple[int, ...] | None, input_size: tuple[int, int]) -> bool:
    """Whether a shape is (1, C, h, w) with h or w > 1, in the input's proportions as channels-last maps are not."""
    if shape is None or len(shape) != 4 or shape[0] != 1 or max(shape[2:]) < 2:
        return False
    height_px, width_px = input_size
    # Unpadded convolutions shift the proportions of an oblong input a little.
    return abs(shape[2] * width_px - shape[3] * height_px) <= 2 * max(input_size)


def repeated(traces: Sequence[Trace]) -> set[str]:
    """Names of the modules that run more than once."""
    counts: dict[int, int] = {}
    for trace in traces:
        counts[id(trace.module)] = counts.get(id(trace.module), 0) + 1
    return {trace.name for trace in traces if counts[id(trace.module)] > 1}


def outermost(candidates: Sequence[Candidate], place: int) -> Candidate:
    """The outermost of the modules that return one and the same tensor."""
    return min((c for c in candidates if c.trace.place == place), key=lambda c: (c.trace.depth, -c.trace.order))


def _fit(found: Sequence[Candidate], traces: Sequence[Trace], class_count: int) -> list[Candidate]:
    last_parametrised = max((t.order for t in traces if next(t.module.parameters(False), None) is not None), default=-1)
    more_than_once = repeated(traces)
    return [
        candidate
        for candidate in found
        if candidate.name not in more_than_once
        and not isinstance(candidate.trace.module, _TRANSPARENT)
        and not _is_pool(candidate.trace.module, is_line=min(candidate.size) == 1)
        and not (candidate.channels == class_count and candidate.trace.order >= last_parametrised)
    ]


def _patchings(input_size: tuple[int, int]) -> list[tuple[int, int]]:
    """Grids of square patches."""
    height_px, width_px = input_size
    return [
        (height_px // patch_px, width_px // patch_px)
        for patch_px in range(2, min(input_size) // 2 + 1)
        if height_px % patch_px == 0 and width_px % patch_px == 0
    ]


def _is_attention(module: nn.Module) -> bool:
    # Attention weights (1, heads, tokens, tokens) look like feature maps.
    return "attention" in type(module).__name__.lower()


def _inside_attention(traces: Sequence[Trace]) -> set[int]:
    """Orders of the runs of attention modules and of what lies in them.

    A module named for attention that holds another one is a block: it has norms of its own.
    """
    named = [
        trace.name
        for trace in traces
        if not isinstance(trace.module, _TRANSPARENT)
        and (
            _ATTENTION_TYPE.search(type(trace.module).__name__.lower())
            or trace.name.rpartition(".")[2] in _ATTENTION_NAMES
        )
    ]
    holders = {name for name in named if any(other.startswith(f"{name}.") for other in named)}
    inner = set(named) - holders
    prefixes = tuple(f"{name}." for name in inner)
    return {trace.order for trace in traces if trace.name in inner or trace.name.startswith(prefixes)}


def _is_pool(module: nn.Module, *, is_line: bool) -> bool:
    """Whether a module pools adaptively, or to a line of pixels: the layer before it is finer or the same."""
    kind = type(module).__name__.lower()
    return "pool" in kind and (is_line or "adaptive" in kind)
