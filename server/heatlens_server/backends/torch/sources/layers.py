"""Which layers of a network can be explained, and how their outputs are read as maps, found by running it."""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from heatlens_server.backends.torch.cam.grid import MAP, Grid, Layout
from heatlens_server.backends.torch.sources.feature_maps import (
    Candidate,
    grid_of,
    is_line,
    map_candidates,
    outermost,
    repeated,
    seen_grids,
    token_candidates,
    unread_tokens,
)
from heatlens_server.backends.torch.sources.output_reading import OutputReading
from heatlens_server.backends.torch.sources.trace import Trace, depends, run
from heatlens_server.core.errors import ModelLoadError

# A resolution counts as a further stage if it is this many times the one before.
_STAGE_RATIO = 1.5
# Where earlier blocks of a network of one resolution are explained.
_DEPTHS = (3 / 4, 1 / 2, 1 / 4)
# "3" of "blocks.3.norm1", "encoder_layer_3" of "encoder.layers.encoder_layer_3.ln_1".
_NUMBERED = re.compile(r"(\D*_)?(\d+)")

Scores = Callable[[object], Tensor]
"""Finds the class scores (1, classes, ...) in what a network returns; raises ModelLoadError if there are none."""


_SCORES: Scores = OutputReading().scores


@dataclass(frozen=True, slots=True)
class Discovery:
    """What running a network told about it.

    Attributes:
        layers: names of the layers that can be explained, the default first.
        grids: how each of them is read as a map.
        class_count: number of classes.
        assumptions: what was found or assumed, one sentence each, with the key that overrides it.
    """

    layers: tuple[str, ...]
    grids: Mapping[str, Grid]
    class_count: int
    assumptions: tuple[str, ...] = ()


def discover(
    module: nn.Module,
    input_size: tuple[int, int],
    wanted: Sequence[str] = (),
    *,
    grids: Mapping[str, Grid] | None = None,
    scores: Scores = _SCORES,
    scored: bool = True,
    channels: int = 3,
) -> Discovery:
    """Run a network on a black image and find its classes and the layers that can be explained.

    The default layer is what people choose for Grad-CAM by hand: the last module, in order of execution, whose output
    is a feature map (1, C, h, w) with h > 1 or w > 1, named by the outermost module that returns that very tensor.
    That is "layer4" of a ResNet, "features" of a VGG, DenseNet, MobileNetV2 or ConvNeXt, "Mixed_7c" of Inception v3.
    After it come the ends of the earlier stages, deepest first: per resolution, the last of the outermost modules.

    If channels-last maps or tokens come after the last feature map, the default is the last of those outside
    attention on whose places of the image the scores depend. That is the norm before the last attention of a ViT with
    a class token, the last norm of one that averages its tokens, the last norm of timm's Swin. Blocks at 3/4, 1/2 and
    1/4 of the depth follow, if the network has one resolution.

    Args:
        module: in eval mode; takes float32 (1, C, H, W). Left as it was.
        input_size: (H, W).
        wanted: layers named by the operator; checked, and returned as they are.
        grids: how to read some of these, if the operator says so.
        scores: finds the class scores in what the network returns.
        scored: whether its last maps may be class scores already, which are not explained; False for embeddings, whose
            last features have as many channels as the embedding has elements.
        channels: C of the input.

    Raises:
        ModelLoadError: the network fails or returns no scores, no layer is fit, or a wanted layer is not.
    """
    traces, output = run(module, input_size, channels=channels)
    class_count = int(scores(output).shape[1])
    search = _Search(module, input_size, traces, class_count if scored else 0, scores, channels)
    if wanted:
        found = {name: _checked(name, (grids or {}).get(name), search) for name in wanted}
    else:
        found = {candidate.name: candidate.grid for candidate in _choose(search)}
    return Discovery(tuple(found), found, class_count)


@dataclass(frozen=True, slots=True)
class _Search:
    """A network, its run, and whether its scores depend on something."""

    module: nn.Module
    input_size: tuple[int, int]
    traces: Sequence[Trace]
    class_count: int
    scores: Scores
    channels: int

    def depends(self, candidates: Sequence[Candidate]) -> bool:
        """Whether the scores depend on places of the image in any of these outputs."""
        places = [(candidate.trace.module, candidate.grid) for candidate in candidates]
        return depends(self.module, self.input_size, places, self.scores, channels=self.channels)


def _choose(search: _Search) -> list[Candidate]:
    maps = map_candidates(search.traces, search.input_size, search.class_count)
    after = maps[-1].trace.order if maps else -1
    tokens = token_candidates(search.traces, search.input_size, search.class_count)
    default = _last_dependent(
        [token for token in tokens if token.trace.order > after and token is outermost(tokens, token.trace.place)],
        search,
    )
    if default is None:
        default = _last_map(maps, search)
    stages = _stages(default, maps, tokens, search)
    blocks = [] if stages and default.grid.layout is not Layout.TOKENS else _earlier_blocks(default, tokens)
    return [default, *(block for block in blocks if search.depends([block])), *stages]


def _last_map(maps: Sequence[Candidate], search: _Search) -> Candidate:
    if not maps:
        raise ModelLoadError(
            "no layer returns a feature map (N, C, h, w), a channels-last map or tokens that fit the image, runs once "
            "per image and has a place of the image that the class scores depend on"
        )
    default = outermost(maps, maps[-1].trace.place)
    if any(trace.order > maps[-1].trace.order for trace in unread_tokens(search.traces, search.input_size)):
        raise ModelLoadError(
            f"the network's last features are tokens that fit no grid of the image; the last feature map "
            f"(N, C, h, w) is {default.name!r}: name it in `layers` to explain that one, or a layer of tokens with its "
            f"form in `grids`"
        )
    return default


def _last_dependent(candidates: Sequence[Candidate], search: _Search) -> Candidate | None:
    """The last one that the scores depend on.

    NaN in several outputs at once tells whether the scores depend on any of them, so that bisection finds the last in
    a few runs: about twice the logarithm of how far it is from the end.
    """
    high, span = len(candidates), 1
    while high > 0 and not search.depends(candidates[max(0, high - span) : high]):
        high, span = high - span, span * 2
    if high <= 0:
        return None
    low = max(0, high - span)
    while high - low > 1:
        middle = (low + high) // 2
        if search.depends(candidates[middle:high]):
            low = middle
        else:
            high = middle
    return candidates[low]


def _stages(
    default: Candidate, maps: Sequence[Candidate], tokens: Sequence[Candidate], search: _Search
) -> list[Candidate]:
    """The ends of the stages of higher resolution before the default layer, deepest first; none that are tokens.

    Tokens of several resolutions need not be in the order of the image's rows: Hiera's are in that of its pooling.
    """
    before = [c for c in (*maps, *tokens) if c.trace.order < default.trace.order and c.grid.layout is not Layout.TOKENS]
    chosen, height = [], default.height
    for stage in sorted({candidate.height for candidate in before}):
        if stage >= _STAGE_RATIO * height:
            chosen.append(_end([candidate for candidate in before if candidate.height == stage]))
            height = stage
    return [stage for stage in chosen if stage.grid.layout is Layout.MAP or search.depends([stage])]


def _end(stage: Sequence[Candidate]) -> Candidate:
    """The end of a stage: the last of the outermost feature maps; a channels-last map, if it is later and no deeper."""
    maps = [candidate for candidate in stage if candidate.grid.layout is Layout.MAP]
    others = [candidate for candidate in stage if candidate.grid.layout is not Layout.MAP]
    end = min(maps, key=lambda c: (c.trace.depth, -c.trace.order)) if maps else None
    other = outermost(others, others[-1].trace.place) if others else None
    if end is None or other is None:
        return end or other or stage[-1]
    return other if other.trace.order > end.trace.order and other.trace.depth <= end.trace.depth else end


def _earlier_blocks(default: Candidate, tokens: Sequence[Candidate]) -> list[Candidate]:
    """What stands where the default layer does, in blocks at some depths; deepest first.

    A default layer behind the last block has no equals: then the blocks themselves are taken.
    """
    alike = [c for c in tokens if c.size == default.size and c.trace.order <= default.trace.order]
    equals = [c for c in alike if c.trace.place == default.trace.place]
    blocks = [c for c in alike if _NUMBERED.fullmatch(c.name.rpartition(".")[2]) and _holds_modules(c)]
    for candidate in (*equals, *reversed(blocks)):
        row = _row(candidate, alike)
        if len(row) > 1:
            wanted = [row[place] for depth in _DEPTHS if (place := round(len(row) * depth) - 1) >= 0]
            return [block for block in dict.fromkeys(wanted) if block.trace.place != default.trace.place]
    return []


def _holds_modules(candidate: Candidate) -> bool:
    return next(candidate.trace.module.children(), None) is not None


def _row(candidate: Candidate, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates whose names differ from this one's in one number, by that number."""
    by_name = {c.name: c for c in candidates}
    parts = candidate.name.split(".")
    for position, part in enumerate(parts):
        numbered = _NUMBERED.fullmatch(part)
        if numbered is None:
            continue
        names = [
            ".".join([*parts[:position], f"{numbered[1] or ''}{number}", *parts[position + 1 :]])
            for number in range(int(numbered[2]) + 1)
        ]
        row = [by_name[name] for name in names if name in by_name]
        if len(row) > 1:
            return row
    return [candidate]


def _checked(name: str, given: Grid | None, search: _Search) -> Grid:
    """Check a layer named by the operator; return how it is read as a map."""
    known = [known for known, _ in search.module.named_modules() if known]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ModelLoadError(f"layers: there is no module {name!r}{hint}")
    runs = [trace for trace in search.traces if trace.name == name]
    if not runs:
        raise ModelLoadError(f"layers: module {name!r} does not run in a forward pass")
    if len(runs) > 1 or name in repeated(search.traces):
        raise ModelLoadError(f"layers: module {name!r} runs more than once in a forward pass")
    shape = runs[0].shape
    if given is not None:
        _check_form(name, given, shape)
    grid = given or grid_of(shape, search.input_size, seen_grids(search.traces, search.input_size))
    if grid is None and is_line(shape):
        grid = MAP
    if grid is None:
        raise ModelLoadError(
            f"layers: module {name!r} returns {shape or 'no single tensor'}, not a feature map (1, C, h, w) with "
            f"h or w > 1, a channels-last map or tokens that fit the image; `grids` can say how it is read"
        )
    if grid.layout is not Layout.MAP and not search.depends([Candidate(runs[0], grid)]):
        raise ModelLoadError(
            f"layers: the class scores do not depend on the places of the image in what module {name!r} returns; "
            f"choose a layer before the last attention"
        )
    return grid


def _check_form(name: str, grid: Grid, shape: tuple[int, ...] | None) -> None:
    tokens = grid.prefix + grid.height * grid.width
    if grid.layout is Layout.TOKENS:
        fits, form = shape is not None and len(shape) == 3 and shape[1] == tokens, f"(1, {tokens}, C)"
    elif grid.layout is Layout.CHANNELS_LAST:
        fits, form = shape is not None and len(shape) == 4, "(1, h, w, C)"
    else:
        fits, form = shape is not None and len(shape) == 4, "(1, C, h, w)"
    if not fits:
        raise ModelLoadError(f"grids: module {name!r} returns {shape or 'no single tensor'}, not {form}")
