"""Which layers of networks for segmentation and detection can be explained: those of their backbones.

What comes after a backbone is close to the answer already: a map of each class, or boxes of each level. People explain
such networks by the last features of the backbone, as the tutorials of the `grad-cam` package do.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from heatlens_server.backends.torch.cam.grid import Grid, Layout
from heatlens_server.backends.torch.sources.feature_maps import Candidate, map_candidates, outermost, repeated
from heatlens_server.backends.torch.sources.found_boxes import BoxSearch, detect
from heatlens_server.backends.torch.sources.layers import Discovery, Scores, discover
from heatlens_server.backends.torch.sources.trace import Trace, depends, run
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.grid import MAP

# What libraries call the part of a segmentation network that comes before the head.
_BACKBONES = ("backbone", "encoder")
# Maps of pooling pyramids (PSPNet, DeepLabV3) are coarser than a network's own.
_COARSEST = 32
# A resolution counts as a further stage if it is this many times the one before.
_STAGE_RATIO = 1.5
# The least that the levels of SSD take, and a multiple of what feature pyramids halve images to.
_DETECTOR_PX = 320
# Where torchvision's detectors have their number of labels.
_COUNTS = (
    "roi_heads.box_predictor.cls_score.out_features",
    "head.classification_head.num_classes",
    "head.classification_head.num_columns",
)
# Where torchvision's detectors with a feature pyramid keep the network that it is built on.
_BODY = "body"


def discover_for_segmentation(
    module: nn.Module,
    input_size: tuple[int, int],
    wanted: Sequence[str],
    *,
    scores: Scores,
    grids: Mapping[str, Grid],
    channels: int = 3,
) -> Discovery:
    """Find the classes and the layers of a network for segmentation.

    The default layer is the last feature map of the lowest resolution: of the submodule "backbone" or "encoder", if it
    has one, or else of the whole network, where that is the bottleneck (Vinogradova et al. 2020, arXiv:2002.11434).
    After it come the ends of the earlier stages, deepest first.

    Args:
        module: in eval mode; takes float32 (1, C, H, W). Left as it was.
        input_size: (H, W).
        wanted: layers named by the operator; checked, and returned as they are.
        scores: finds the scores (1, classes, h, w) in what the network returns.
        grids: how to read some of these, if the operator says so.
        channels: C of the input.

    Raises:
        ModelLoadError: the network fails or is of another kind, no layer is fit, or a wanted layer is not.
    """
    if wanted:
        return discover(module, input_size, wanted, grids=grids, scores=scores, channels=channels)
    traces, output = run(module, input_size, channels=channels)
    class_count = int(scores(output).shape[1])
    prefix = _prefix(module)
    candidates = [
        candidate
        for candidate in map_candidates(traces, input_size, class_count)
        if f"{candidate.name}.".startswith(prefix) and candidate.height * _COARSEST >= input_size[0]
    ]
    if not candidates:
        raise ModelLoadError("no layer of the backbone returns a feature map (N, C, h, w): name one in `layers`")
    coarsest = min(candidate.height for candidate in candidates)
    last = [candidate for candidate in candidates if candidate.height == coarsest][-1]
    chosen = _with_stages(outermost(candidates, last.trace.place), candidates)
    return Discovery(tuple(chosen), dict.fromkeys(chosen, MAP), class_count)


def discover_for_detection(
    module: nn.Module, input_size: tuple[int, int], wanted: Sequence[str], *, channels: int = 3
) -> Discovery:
    """Find the labels and the layers of a detector with torchvision's interface.

    The default layer is the last one of the backbone on which all its levels depend, so that every detection does:
    "backbone.body.layer4" of a ResNet with a feature pyramid, "backbone.features" of SSD. After it come the ends of the
    earlier stages, deepest first, and "backbone" itself: all levels at once, without gradients.

    Where no submodule "backbone" returns maps by name, the default layer is the last one on which all boxes in a photo
    and in noise depend.

    Args:
        module: in eval mode; takes float32 (1, C, H, W). Left as it was.
        input_size: (H, W).
        wanted: layers named by the operator; checked, and returned as they are.
        channels: C of the input.

    Raises:
        ModelLoadError: the network fails or is of another kind, no layer is fit, or a wanted layer is not.
    """
    class_count = _label_count(module)
    pyramid = _pyramid(module, channels)
    if pyramid is None:
        # Said here what a detector is, before something fails that takes it for one.
        detect(module, torch.zeros(channels, *input_size))
    if wanted:
        traces, _ = run(module, input_size, channels=channels, as_list=True)
        return Discovery(tuple(wanted), _checked(module, traces, wanted, pyramid=pyramid), class_count)
    if pyramid is None:
        layers = _common_layers(module, input_size, channels)
        return Discovery(tuple(layers), dict.fromkeys(layers, MAP), class_count, (_found_by_boxes(layers[0]),))
    inner = _backbone_layers(module.get_submodule(pyramid), channels)
    grids = dict.fromkeys([f"{pyramid}.{name}" for name in inner], MAP)
    return Discovery((*grids, pyramid), {**grids, pyramid: Grid(Layout.PYRAMID)}, class_count)


def _label_count(module: nn.Module) -> int:
    """How many labels a detector of torchvision's knows, the background included; 0 for others, which do not tell."""
    counts = {count for child in module.modules() for path in _COUNTS if isinstance(count := _at(child, path), int)}
    return counts.pop() if len(counts) == 1 else 0


def _at(module: nn.Module, path: str) -> object:
    found: object = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _pyramid(module: nn.Module, channels: int) -> str | None:
    """The name of the submodule "backbone" that returns maps by name, of the network or of one inside it."""
    named = [name for name, _ in module.named_modules() if name.rpartition(".")[2] == _BACKBONES[0]]
    return next((name for name in named if _returns_levels(module.get_submodule(name), channels)), None)


def _returns_levels(backbone: nn.Module, channels: int) -> bool:
    try:
        with torch.no_grad():
            output: Any = backbone(torch.zeros(1, channels, _DETECTOR_PX, _DETECTOR_PX))
    # One that takes something else may raise anything.
    except Exception:
        return False
    levels = list(output.values()) if isinstance(output, Mapping) else []
    return bool(levels) and all(isinstance(level, Tensor) and level.ndim == 4 for level in levels)


def _common_layers(module: nn.Module, input_size: tuple[int, int], channels: int) -> list[str]:
    """The last layer that every box depends on, and the ends of the stages before it."""
    traces, _ = run(module, input_size, channels=channels, as_list=True)
    prefix = _prefix(module)
    candidates = [c for c in map_candidates(traces, input_size, 0) if f"{c.name}.".startswith(prefix)]
    search = BoxSearch(module, (channels, *input_size))
    default = _last(candidates, search.is_common)
    if default is None:
        raise ModelLoadError("the detector's boxes have no feature map (1, C, h, w) in common: name one in `layers`")
    return _with_stages(outermost(candidates, default.trace.place), candidates)


def _found_by_boxes(layer: str) -> str:
    return (
        f"Layer {layer!r} is explained: the last feature map on which all boxes depend that were found in a photo and "
        f"in noise; layers overrides that."
    )


def _prefix(module: nn.Module) -> str:
    """What the names of the layers of a network's backbone begin with; empty if it has none."""
    return next((f"{name}." for name in _BACKBONES if isinstance(getattr(module, name, None), nn.Module)), "")


def _backbone_layers(backbone: nn.Module, channels: int) -> list[str]:
    size = (_DETECTOR_PX, _DETECTOR_PX)
    traces, _ = run(backbone, size, channels=channels)
    prefix = f"{_BODY}." if isinstance(getattr(backbone, _BODY, None), nn.Module) else ""
    candidates = [c for c in map_candidates(traces, size, 0) if c.name.startswith(prefix)]

    def is_common(candidate: Candidate) -> bool:
        return depends(backbone, size, [(candidate.trace.module, MAP)], _in_common, channels=channels)

    default = _last(candidates, is_common)
    if default is None:
        raise ModelLoadError("no layer of the backbone has all its levels depend on it: name one in `layers`")
    return _with_stages(outermost(candidates, default.trace.place), candidates)


def _in_common(levels: Any) -> Tensor:  # noqa: ANN401 - what a backbone returns
    """NaN if every level has a NaN."""
    marks = torch.stack([level.isnan().any() for level in levels.values()])
    return torch.where(marks.all(), torch.nan, 0.0)


def _last(candidates: Sequence[Candidate], fits: Callable[[Candidate], bool]) -> Candidate | None:
    """The last candidate that fits. Those before one that fits do too, so that bisection finds it in a few runs."""
    if candidates and fits(candidates[-1]):
        return candidates[-1]
    low, high = -1, len(candidates) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if fits(candidates[middle]):
            low = middle
        else:
            high = middle
    return candidates[low] if low >= 0 else None


def _with_stages(default: Candidate, candidates: Sequence[Candidate]) -> list[str]:
    """The default layer, and the ends of the stages of higher resolution before it, deepest first."""
    chosen, height = [default.name], default.height
    for candidate in sorted(candidates, key=lambda c: (c.height, c.trace.depth, -c.trace.order)):
        if candidate.height >= _STAGE_RATIO * height and candidate.trace.order < default.trace.order:
            chosen.append(candidate.name)
            height = candidate.height
    return chosen


def _checked(
    module: nn.Module, traces: Sequence[Trace], wanted: Sequence[str], *, pyramid: str | None
) -> dict[str, Grid]:
    known = {name for name, _ in module.named_modules() if name}
    found = {}
    for name in wanted:
        runs = [trace for trace in traces if trace.name == name]
        if name not in known:
            raise ModelLoadError(f"layers: there is no module {name!r}")
        if len(runs) != 1 or name in repeated(traces):
            raise ModelLoadError(f"layers: module {name!r} must run once in a forward pass, and runs {len(runs)} times")
        if name == pyramid:
            found[name] = Grid(Layout.PYRAMID)
        elif runs[0].shape is not None and len(runs[0].shape) == 4 and min(runs[0].shape[2:]) > 1:
            found[name] = MAP
        else:
            raise ModelLoadError(
                f"layers: module {name!r} returns {runs[0].shape or 'no single tensor'}, not a feature map "
                f"(1, C, h, w) with h, w > 1"
            )
    return found
