"""The gradient of a class score with respect to the target layer, as a graph of PyTorch's operators.

Only the tail, what follows the target layer, is differentiated: its nodes are run one by one under autograd while
`make_fx` writes down every operator of the forward and of the backward pass. Wherever a node of the tail reads
something computed before the layer (a skip connection), that value is an input of the traced function.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import sympy
import torch
from torch import SymInt, Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from heatlens_server.backends.torch.cam.saliency import saliency
from heatlens_server.backends.torch.export.capture import MARK, Captured
from heatlens_server.backends.torch.export.substitutes import SUBSTITUTES
from heatlens_server.core.errors import ExportError
from heatlens_server.core.methods import ABSENT, Method, Score
from heatlens_server.maps.methods import raw_map
from heatlens_server.maps.precision import FP16_GRADIENT_SCALE, at_least_float32
from heatlens_server.maps.targets import resolve, seeds


@dataclass(frozen=True, slots=True)
class Goal:
    """What is differentiated.

    Attributes:
        score: of each class.
        sigmoid: whether its probability is the sigmoid of its logit alone.
    """

    score: Score = Score.LOGIT
    sigmoid: bool = False


LOGIT = Goal()


@dataclass(frozen=True, slots=True)
class Tail:
    """What follows a target layer.

    Attributes:
        mark: the node that marks the layer's output.
        nodes: the nodes of the captured graph that depend on the layer, in order.
        needs: the tensors from before the layer that they read, in order.
        sizes: the sizes from before the layer that they read, in order.
    """

    mark: Node
    nodes: tuple[Node, ...]
    needs: tuple[Node, ...]
    sizes: tuple[Node, ...]


def tail_of(captured: Captured, layer: str) -> Tail:
    """Find the tail of a layer.

    Raises:
        ExportError: the logits do not depend on the layer.
    """
    mark = captured.marks[layer]
    inside: set[Node] = {mark}
    nodes: list[Node] = []
    for node in captured.nodes:
        if node is not mark and not inside.isdisjoint(node.all_input_nodes):
            inside.add(node)
            nodes.append(node)
    if captured.logits not in inside:
        raise ExportError(f"the model's output does not depend on layer {layer!r}")
    # Nothing else needs to run: torch.export leaves assertions behind.
    leading = {captured.logits}
    for node in reversed(nodes):
        if node in leading:
            leading.update(node.all_input_nodes)
    nodes = [node for node in nodes if node in leading]
    outside = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside)
    return Tail(
        mark=mark,
        nodes=tuple(nodes),
        needs=tuple(node for node in outside if isinstance(node.meta["val"], Tensor)),
        sizes=tuple(node for node in outside if not isinstance(node.meta["val"], Tensor)),
    )


def trace_ranked(captured: Captured, tail: Tail, classes: int, goal: Goal = LOGIT) -> GraphModule:
    """Trace the tail for a fixed number of classes: its forward pass runs once.

    Returns:
        A graph from (activations (N, A, h, w), class_index (N, K), *needs) to (logits (N, C), class_id (N, K),
        activations (N, A, h, w), gradients (N, K, A, h, w)), all but class_id float32.
    """

    def run(activations: Tensor, class_index: Tensor, *needs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits, leaf = _forward(captured, tail, activations, needs)
        class_id = resolve(logits.detach(), class_index)
        gradients = [
            _gradient(logits, leaf, class_id[:, k : k + 1], goal, retain=k + 1 < classes)[:, None]
            for k in range(classes)
        ]
        stacked = gradients[0] if classes == 1 else torch.cat(gradients, dim=1)
        return at_least_float32(logits.detach()), class_id, at_least_float32(activations), stacked

    return _trace(run, captured, (tail.mark, captured.class_index, *tail.needs))


def trace_resolve(captured: Captured) -> GraphModule:
    """Trace the choice of classes: a graph from (logits (N, C), class_index (N, K)) to (logits float32, class_id)."""

    def run(logits: Tensor, class_index: Tensor) -> tuple[Tensor, Tensor]:
        return at_least_float32(logits), resolve(logits, class_index)

    return _trace(run, captured, (captured.logits, captured.class_index))


def trace_rows(captured: Captured, tail: Tail, goal: Goal = LOGIT) -> GraphModule:
    """Trace the tail for any number of classes: every class of every image is a row of its own.

    The tail's forward pass runs a second time, on N * K rows: next to nothing for the layers that people explain, and
    in exchange the backward pass of all classes is one batch.

    Returns:
        A graph from (class_id (N, K), activations (N, A, h, w), *needs) to (activations (N, A, h, w), gradients
        (N, K, A, h, w)), both float32.
    """
    per_image = [_count_per_image(captured, node) for node in tail.needs]

    def run(class_id: Tensor, activations: Tensor, *needs: Tensor) -> tuple[Tensor, Tensor]:
        images, classes = class_id.shape
        rows = [
            value if count is None else _repeated(value, images, classes, count)
            for value, count in zip(needs, per_image, strict=True)
        ]
        row_logits, leaf = _forward(captured, tail, _repeated(activations, images, classes, 1), rows)
        gradients = _gradient(row_logits, leaf, class_id.reshape(images * classes, 1), goal, retain=False)
        return at_least_float32(activations), gradients.reshape(images, classes, *gradients.shape[1:])

    return _trace(run, captured, (captured.class_index, tail.mark, *tail.needs))


def trace_map(method: Method, activations: Tensor, gradients: Tensor) -> GraphModule:
    """Trace a method's maths, the functions of `maps/` themselves.

    Args:
        method: not one of activations alone. CAM's class weights are the gradients summed over all pixels, which is
            what they are where CAM applies: behind global average pooling and one linear layer.
        activations: a fake tensor (N, A, h, w).
        gradients: a fake tensor (N, K, A, h, w).

    Returns:
        A graph from the two to (cam (N, K, h, w), cam_scale (N, K), cam_offset (N, K)).
    """

    def run(activations: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        factors = gradients.sum((-2, -1)) if method is Method.CAM else gradients
        finished = saliency([raw_map(method, activations, factors)])
        return finished.values, finished.scale, finished.offset

    return traced(run, (activations, gradients))


def trace_activation_map(method: Method, activations: Tensor, class_id: Tensor) -> GraphModule:
    """Trace the maths of a method of activations alone.

    Args:
        method: which one.
        activations: a fake tensor (N, A, h, w), of any precision.
        class_id: a fake tensor int64 (N, K).

    Returns:
        A graph from the two to (activations float32, cam (N, K, h, w), cam_scale (N, K), cam_offset (N, K)). The map of
        an absent class is zero, as if there were gradients.
    """

    def run(activations: Tensor, class_id: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        activations = at_least_float32(activations)
        maps = torch.where(class_id[..., None, None] == ABSENT, 0.0, raw_map(method, activations, class_id))
        finished = saliency([maps])
        return activations, finished.values, finished.scale, finished.offset

    return traced(run, (activations, class_id))


def traced(function: Callable[..., object], values: Sequence[object]) -> GraphModule:
    """Write down what a function does to fake tensors.

    Raises:
        ExportError: it cannot be traced for every batch size.
    """
    try:
        with torch.no_grad():
            graph_module = make_fx(function, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*values)
    except ExportError:
        raise
    # Torch's operators raise what they like.
    except Exception as error:
        raise ExportError(
            f"what follows the target layer cannot be differentiated ({type(error).__name__}: {_first_line(error)})"
        ) from error
    graph_module.graph.eliminate_dead_code()
    return graph_module


def _trace(function: Callable[..., object], captured: Captured, inputs: Sequence[Node]) -> GraphModule:
    graph_module = traced(function, [node.meta["val"] for node in inputs])
    shape_env = captured.image.meta["val"].fake_mode.shape_env
    for symbol in (captured.batch, *captured.class_index.meta["val"].shape[1:]):
        if isinstance(symbol, SymInt) and shape_env.replace(symbol.node.expr).is_number:
            raise ExportError("what follows the target layer cannot be differentiated for every batch size")
    return graph_module


def _forward(captured: Captured, tail: Tail, activations: Tensor, needs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Run the tail under autograd on any number of rows; return its logits and the leaf to differentiate by."""
    leaf = activations.detach().requires_grad_()
    values: dict[Node, Any] = {tail.mark: leaf, **dict(zip(tail.needs, needs, strict=True))}
    # Sizes that were computed before the layer, for as many rows as there are now.
    for node in tail.sizes:
        values[node] = _evaluated(captured, node.meta["val"], activations.shape[0])
    with torch.enable_grad():
        for node in tail.nodes:
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            # The mark of a later layer only passes on what it is given.
            values[node] = args[0] if node.target is MARK else _operator(node)(*args, **kwargs)
    logits = values[captured.logits]
    if not isinstance(logits, Tensor) or not logits.requires_grad:
        raise ExportError("the model's output does not depend on the target layer by a gradient")
    return logits, leaf


def _operator(node: Node) -> Callable[..., object]:
    target = node.target
    if not callable(target):
        raise ExportError(f"the network's graph has a node that is no operator: {node.op}")
    return cast("Mapping[object, Callable[..., object]]", SUBSTITUTES).get(target, target)


def _gradient(logits: Tensor, leaf: Tensor, class_id: Tensor, goal: Goal, *, retain: bool) -> Tensor:
    """Gradient (R, A, h, w), float32, of each row's score of class_id (R, 1); zero where that is no class."""
    scale = FP16_GRADIENT_SCALE if logits.dtype is torch.float16 else 1.0
    if goal.score is not Score.LOGIT:
        # Probabilities of confident networks have tiny derivatives. The pass is linear: they may be put in afterwards.
        own = seeds(logits.detach(), class_id, goal.score, sigmoid=goal.sigmoid).squeeze(1)
        size = own.abs().amax(dim=1, keepdim=True)
        seed = (own / torch.where(size == 0, 1.0, size) * scale).to(logits.dtype)
        (gradient,) = torch.autograd.grad(logits, [leaf], seed, retain_graph=retain)
        found: Tensor = at_least_float32(gradient) * (size / scale)[:, :, None, None]
        return found
    hot = class_id == torch.arange(logits.shape[1])
    seed = torch.where(hot, scale, 0.0).to(logits.dtype)
    (gradient,) = torch.autograd.grad(logits, [leaf], seed, retain_graph=retain)
    return gradient if scale == 1.0 else gradient.float() / scale


def _repeated(value: Tensor, images: int, classes: int, per_image: int) -> Tensor:
    """Repeat (images * per_image, ...) for every class: (images * classes * per_image, ...), image by image."""
    rest = value.shape[1:]
    grouped = value.reshape(images, 1, per_image, *rest)
    return grouped.expand(images, classes, per_image, *rest).reshape(images * classes * per_image, *rest)


def _count_per_image(captured: Captured, node: Node) -> int | None:
    """How many entries of dimension 0 belong to one image; None if the value is the same for all images."""
    sizes = node.meta["val"].shape
    if not any(isinstance(size, SymInt) for size in sizes):
        return None
    if isinstance(sizes[0], SymInt) and not any(isinstance(size, SymInt) for size in sizes[1:]):
        count = sympy.simplify(sizes[0].node.expr / captured.batch.node.expr)
        if count.is_Integer:
            return int(count)
    raise ExportError("a connection past the target layer does not have the images in its first dimension")


def _evaluated(captured: Captured, size: int | SymInt, rows: int | SymInt) -> int | SymInt:
    """A size as a function of the batch size, with another batch size."""
    if isinstance(size, int):
        return size
    symbol = captured.batch.node.expr
    if size.node.expr.free_symbols - {symbol}:
        raise ExportError("the network computes with a size that is not the batch's")
    result: int | SymInt = sympy_interp(PythonReferenceAnalysis, {symbol: rows}, size.node.expr)
    return result


def _first_line(error: Exception) -> str:
    return str(error).split("\n", maxsplit=1)[0][:200]
