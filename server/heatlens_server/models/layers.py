"""Which layers of a network can be explained, found by running it once."""

import difflib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from heatlens_server.errors import ModelLoadError

# Their output is their input, so they are no place of their own.
_TRANSPARENT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
# A resolution counts as a further stage if it is this many times the one before.
_STAGE_RATIO = 1.5


@dataclass(slots=True)
class _Trace:
    """One module's run. `place` numbers the distinct tensors: a container shares its last child's."""

    name: str
    module: nn.Module
    order: int
    shape: tuple[int, ...] | None
    place: int

    @property
    def depth(self) -> int:
        return self.name.count(".")


@dataclass(frozen=True, slots=True)
class Discovery:
    """What running a network once told about it.

    Attributes:
        layers: names of the layers that can be explained, the default first.
        class_count: number of classes.
    """

    layers: tuple[str, ...]
    class_count: int


def discover(module: nn.Module, input_size: tuple[int, int], wanted: Sequence[str] = ()) -> Discovery:
    """Run a network on one black image and find its classes and the layers that can be explained.

    The default layer is what people choose for Grad-CAM by hand: the last module, in order of execution, whose output
    is a feature map (1, C, h, w) with h > 1 and w > 1, named by the outermost module that returns that very tensor.
    That is "layer4" of a ResNet, "features" of a VGG, DenseNet, MobileNetV2 or ConvNeXt, "Mixed_7c" of Inception v3.
    Left out are adaptive pooling (the layer before it is finer or the same), maps that already are class scores (as
    many channels as classes, and nothing with parameters after them: SqueezeNet's classifier), whatever lies inside
    an attention module, and modules that run more than once. After it come the ends of the earlier stages, deepest
    first: per resolution, the last of the outermost modules.

    A network whose last features are tokens (ViT) or channels-last maps (timm's Swin) is refused unless `wanted`
    names a layer: its last convolution is its first layer, which explains little.

    Args:
        module: in eval mode; float32 (1, 3, H, W) to logits (1, class_count). Left as it was.
        input_size: (H, W).
        wanted: layers named by the operator; checked, and returned as they are.

    Raises:
        ModelLoadError: the network fails or returns no logits, no layer is fit, or a wanted layer is not.
    """
    traces, class_count = _run(module, input_size)
    if wanted:
        for name in wanted:
            _check(name, module, traces, input_size)
        return Discovery(tuple(wanted), class_count)
    return Discovery(_stages(traces, input_size, class_count), class_count)


def _run(module: nn.Module, input_size: tuple[int, int]) -> tuple[list[_Trace], int]:
    traces: list[_Trace] = []
    # Weak, so that activations are freed as usual; only a tensor that is still alive can be returned again.
    places: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def hook_for(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(child: nn.Module, _inputs: object, output: object) -> None:
            shape, place = None, -1 - len(traces)
            if isinstance(output, Tensor):
                shape, place = tuple(output.shape), len(traces)
                known = places.get(id(output))
                if known is not None and known[0]() is output:
                    place = known[1]
                places[id(output)] = (weakref.ref(output), place)
            traces.append(_Trace(name, child, len(traces), shape, place))

        return hook

    handles = [child.register_forward_hook(hook_for(name)) for name, child in module.named_modules() if name]
    try:
        with torch.no_grad():
            logits = module(torch.zeros(1, 3, *input_size))
    # A network is somebody else's code and may raise anything.
    except Exception as error:
        height_px, width_px = input_size
        raise ModelLoadError(
            f"the network fails on an input of (1, 3, {height_px}, {width_px}): {type(error).__name__}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != 1 or logits.shape[1] < 1:
        found = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelLoadError(f"the network must return logits of shape (N, classes), not {found}")
    return traces, int(logits.shape[1])


def _stages(traces: Sequence[_Trace], input_size: tuple[int, int], class_count: int) -> tuple[str, ...]:
    last_parametrised = max((t.order for t in traces if next(t.module.parameters(False), None) is not None), default=-1)
    attention = tuple(f"{t.name}." for t in traces if _is_attention(t.module))
    repeated = _repeated(traces)
    candidates = [
        trace
        for trace in traces
        if _is_feature_map(trace.shape, input_size)
        and trace.name not in repeated
        and not isinstance(trace.module, _TRANSPARENT)
        and not _is_adaptive_pool(trace.module)
        and not _is_attention(trace.module)
        and not trace.name.startswith(attention)
        and not (_channels(trace) == class_count and trace.order >= last_parametrised)
    ]
    if not candidates:
        raise ModelLoadError(
            "no layer returns a feature map (N, C, h, w) and runs once per image; networks whose features are tokens "
            "or channels-last are not supported yet"
        )
    last = candidates[-1]
    if any(trace.order > last.order and _is_tokens(trace.shape, input_size) for trace in traces):
        raise ModelLoadError(
            f"the network's last features are tokens or channels-last maps, which are not supported yet; the last "
            f"feature map (N, C, h, w) is {last.name!r}: name it in `layers` to explain that one"
        )
    default = min((t for t in candidates if t.place == last.place), key=lambda t: (t.depth, -t.order))
    chosen, height = [default], _height(default)
    for trace in sorted(candidates, key=lambda t: (_height(t), t.depth, -t.order)):
        if _height(trace) >= _STAGE_RATIO * height and trace.order < default.order:
            chosen.append(trace)
            height = _height(trace)
    return tuple(trace.name for trace in chosen)


def _check(name: str, module: nn.Module, traces: Sequence[_Trace], input_size: tuple[int, int]) -> None:
    known = [known for known, _ in module.named_modules() if known]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ModelLoadError(f"layers: there is no module {name!r}{hint}")
    runs = [trace for trace in traces if trace.name == name]
    if not runs:
        raise ModelLoadError(f"layers: module {name!r} does not run in a forward pass")
    if len(runs) > 1 or name in _repeated(traces):
        raise ModelLoadError(f"layers: module {name!r} runs more than once in a forward pass")
    if not _is_feature_map(runs[0].shape, input_size):
        found = runs[0].shape or "no single tensor"
        raise ModelLoadError(f"layers: module {name!r} returns {found}, not a feature map (1, C, h, w) with h, w > 1")


def _repeated(traces: Sequence[_Trace]) -> set[str]:
    counts: dict[int, int] = {}
    for trace in traces:
        counts[id(trace.module)] = counts.get(id(trace.module), 0) + 1
    return {trace.name for trace in traces if counts[id(trace.module)] > 1}


def _is_feature_map(shape: tuple[int, ...] | None, input_size: tuple[int, int]) -> bool:
    """Whether a shape is (1, C, h, w) with h and w > 1, in the input's proportions as channels-last maps are not."""
    if shape is None or len(shape) != 4 or shape[0] != 1 or min(shape[2:]) < 2:
        return False
    height_px, width_px = input_size
    # Unpadded convolutions shift the proportions of an oblong input a little.
    return abs(shape[2] * width_px - shape[3] * height_px) <= 2 * max(input_size)


def _is_tokens(shape: tuple[int, ...] | None, input_size: tuple[int, int]) -> bool:
    """Whether a shape is (1, tokens, C), or (1, h, w, C) and nothing else."""
    if shape is None or shape[:1] != (1,):
        return False
    if len(shape) == 3:
        return min(shape[1:]) > 1
    if len(shape) != 4 or _is_feature_map(shape, input_size):
        return False
    return _is_feature_map((1, shape[3], *shape[1:3]), input_size)


def _is_attention(module: nn.Module) -> bool:
    # Attention weights (1, heads, tokens, tokens) look like feature maps.
    return "attention" in type(module).__name__.lower()


def _is_adaptive_pool(module: nn.Module) -> bool:
    return "adaptive" in type(module).__name__.lower() and "pool" in type(module).__name__.lower()


def _channels(trace: _Trace) -> int:
    return trace.shape[1] if trace.shape is not None else 0


def _height(trace: _Trace) -> int:
    return trace.shape[2] if trace.shape is not None else 0
