"""A model's forward pass as a functional ATen graph, with its target layers' outputs marked.

The graph comes from `torch.export` and is not taken apart: linear layers, normalisations, activations and attention
stay whole, so that every format can keep its own good form of them. Parameters enter as inputs and are never
touched, whatever the network's size.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import SymInt, Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind as SignatureKind
from torch.export.graph_signature import OutputKind, TensorArgument
from torch.fx import Node
from torch.utils.hooks import RemovableHandle

from heatlens_server.backends.torch.cam.grid import Grid, from_map, to_map
from heatlens_server.backends.torch.export.functional import functional
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.core.errors import ExportError, ModelLoadError
from heatlens_server.core.graph_spec import CLASS_INDEX, IMAGE, InputKind

# Traced with sizes that are no other dimension's and not 0 or 1, which torch would bake in.
_TRACED_BATCH = 2
_TRACED_CLASSES = 5

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}

# The mark: an operator of our own that survives tracing. It never leaves this room.
_library = torch.library.Library("heatlens", "DEF")  # type: ignore[no-untyped-call]
_library.define("target_layer(Tensor x, str name) -> Tensor")  # type: ignore[no-untyped-call]
_library.impl(  # type: ignore[no-untyped-call]
    "target_layer", lambda x, _name: x.clone(), "CompositeExplicitAutograd"
)
torch.library.register_fake("heatlens::target_layer", lambda x, _name: torch.empty_like(x), lib=_library)
MARK = torch.ops.heatlens.target_layer.default


@dataclass(frozen=True, slots=True)
class Captured:
    """A forward pass.

    Attributes:
        nodes: every computing node in order, the marks included; functional, no node writes to its input.
        constants: the placeholders that stand for parameters, buffers and constants, and what they stand for.
        image: the placeholder `image`.
        class_index: the placeholder `class_index`, (N, K) int64, which nothing uses yet.
        marks: by layer, the node that marks its output, as a map (N, A, h, w) or as it is, and passes it on.
        logits: (N, C).
    """

    nodes: tuple[Node, ...]
    constants: Mapping[Node, Tensor]
    image: Node
    class_index: Node
    marks: Mapping[str, Node]
    logits: Node

    @property
    def batch(self) -> SymInt:
        """N."""
        size: SymInt = self.image.meta["val"].shape[0]
        return size


class _Returning(nn.Module):
    """The network, in a function of its input."""

    def __init__(self, module: nn.Module, run: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.module, self._run = module, run

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return self._run(image)


def record(model: LoadedModel) -> ExportedProgram:
    """Record a model's forward pass with any batch size: from the image to the logits and each layer's output.

    Args:
        model: its module is left as it was.

    Raises:
        ExportError: the network cannot be recorded, or not for every batch size.
    """
    kept: dict[str, Tensor] = {}

    def keeping(layer: str) -> Callable[[nn.Module, object, Tensor], Tensor]:
        def keep(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            try:
                to_map(output, model.grid(layer))
            except ValueError as error:
                raise ExportError(f"layer {layer!r}: {error}") from error
            if layer in kept:
                raise ExportError(f"layer {layer!r} runs more than once in a forward pass")
            kept[layer] = output
            # What follows may write to it.
            return output.clone()

        return keep

    def run(image: Tensor) -> tuple[Tensor, ...]:
        kept.clear()
        logits = model.reading(model.module, image)
        missing = [layer for layer in model.layers if layer not in kept]
        if missing:
            raise ExportError(f"layer {missing[0]!r} does not run in a forward pass")
        return logits, *(kept[layer] for layer in model.layers)

    handles = [model.module.get_submodule(layer).register_forward_hook(keeping(layer)) for layer in model.layers]
    image, _ = traced_inputs(model, InputKind.FLOAT, 1)
    program = _exported(_Returning(model.module, run).eval(), (image,), dynamic_shapes(model, 1)[:1], handles)
    for node in reversed(program.graph.nodes):
        # torch.export leaves assertions behind.
        if node.op == "call_function" and not node.users:
            program.graph.erase_node(node)
    program.graph_module.recompile()
    # What does nothing is gone, and what it was given stands for it.
    (output,) = program.graph.find_nodes(op="output")
    for spec, node in zip(program.graph_signature.output_specs, output.args[0], strict=True):
        spec.arg = TensorArgument(node.name)
    return program


class _Wrapped(nn.Module):
    """The network behind its input's normalisation."""

    gains: Tensor
    biases: Tensor

    def __init__(self, model: LoadedModel, module: nn.Module, input_kind: InputKind, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self._reading = model.reading
        self._dtype = dtype
        self._uint8 = input_kind is InputKind.UINT8
        if self._uint8:
            self.register_buffer("gains", torch.tensor(model.preprocess.gains).view(1, -1, 1, 1))
            self.register_buffer("biases", torch.tensor(model.preprocess.biases).view(1, -1, 1, 1))

    def forward(self, image: Tensor, class_index: Tensor) -> tuple[Tensor, Tensor]:
        if self._uint8:
            image = image.to(torch.float32) * self.gains + self.biases
        if image.dtype is not self._dtype:
            image = image.to(self._dtype)
        return self._reading(self.module, image), class_index


def capture(
    model: LoadedModel,
    layers: Sequence[str],
    *,
    input_kind: InputKind,
    precision: str,
    classes: int | None,
) -> Captured:
    """Record a model's forward pass with any batch size.

    Args:
        model: its module is left as it was.
        layers: the target layers, at least one.
        input_kind: what `image` will hold.
        precision: "fp32" or "fp16", what the network runs in.
        classes: K, or None for any.

    Raises:
        ExportError: the network cannot be recorded, or not for every batch size.
    """
    dtype = _DTYPES[precision]
    module = model.module if dtype is torch.float32 else copy.deepcopy(model.module).to(dtype)
    wrapped = _Wrapped(model, module, input_kind, dtype).eval()
    image, class_index = traced_inputs(model, input_kind, classes)
    handles = [
        module.get_submodule(layer).register_forward_hook(_marking(layer, model.grid(layer))) for layer in layers
    ]
    program = _exported(wrapped, (image, class_index), dynamic_shapes(model, classes), handles)
    return _read(program, layers)


def _exported(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    shapes: tuple[dict[int, object], ...],
    handles: Sequence[RemovableHandle],
) -> ExportedProgram:
    """Record a module, functional, and remove the hooks that this took.

    Raises:
        ExportError: it cannot be recorded, or not for every batch size.
    """
    try:
        with torch.no_grad():
            program = functional(torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False))
    except ExportError:
        raise
    except ModelLoadError as error:
        raise ExportError(str(error)) from error
    # A network is foreign code and may raise anything.
    except Exception as error:
        raise ExportError(f"the network cannot be recorded for every batch size ({type(error).__name__})") from error
    finally:
        for handle in handles:
            handle.remove()
    if any(spec.kind is not OutputKind.USER_OUTPUT for spec in program.graph_signature.output_specs):
        raise ExportError("the network changes its own buffers in a forward pass")
    return program


def traced_inputs(model: LoadedModel, input_kind: InputKind, classes: int | None) -> tuple[Tensor, Tensor]:
    """Example inputs to trace with."""
    dtype = torch.uint8 if input_kind is InputKind.UINT8 else torch.float32
    return (
        torch.zeros(_TRACED_BATCH, model.preprocess.channels, *model.preprocess.input_px, dtype=dtype),
        torch.zeros(_TRACED_BATCH, classes or min(_TRACED_CLASSES, model.class_count), dtype=torch.int64),
    )


def dynamic_shapes(model: LoadedModel, classes: int | None) -> tuple[dict[int, object], dict[int, object]]:
    """Which dimensions of the inputs may vary, and what they are called."""
    batch = Dim("batch")
    return {0: batch}, {0: batch} if classes else {0: batch, 1: Dim("classes", max=model.class_count)}


def _marking(layer: str, grid: Grid) -> Callable[[nn.Module, object, Tensor], Tensor]:
    """Mark what a layer returns; of a map, tokens before the grid go around the mark, as from before the layer."""

    def mark(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        try:
            features = to_map(output, grid)
        except ValueError as error:
            raise ExportError(f"layer {layer!r}: {error}") from error
        return from_map(MARK(features, layer), output, grid)

    return mark


def _read(program: ExportedProgram, layers: Sequence[str]) -> Captured:
    signature = program.graph_signature
    by_name = {node.name: node for node in program.graph.nodes}
    constants: dict[Node, Tensor] = {}
    inputs: dict[str, Node] = {}
    for spec in signature.input_specs:
        node = by_name[spec.arg.name]
        if spec.kind is SignatureKind.USER_INPUT:
            inputs[node.name] = node
        else:
            stored = program.state_dict if spec.target in program.state_dict else program.constants
            constants[node] = stored[str(spec.target)].detach()
    nodes = tuple(node for node in program.graph.nodes if node.op == "call_function")
    marks: dict[str, Node] = {}
    for node in nodes:
        if node.target is MARK:
            layer = str(node.args[1])
            if layer in marks:
                raise ExportError(f"layer {layer!r} runs more than once in a forward pass")
            marks[layer] = node
    for layer in layers:
        if layer not in marks:
            raise ExportError(f"layer {layer!r} does not run in a forward pass")
    output = next(node for node in program.graph.nodes if node.op == "output")
    return Captured(
        nodes=nodes,
        constants=constants,
        image=inputs[IMAGE],
        class_index=inputs[CLASS_INDEX],
        marks=marks,
        logits=output.args[0][0],
    )
