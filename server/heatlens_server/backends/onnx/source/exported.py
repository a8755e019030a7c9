"""A network of PyTorch's whose forward pass was translated to ONNX: from then on it is one from a file."""

from collections.abc import Mapping

import onnx_ir as ir

from heatlens_server.backends.onnx.gradient.find import FoundLayer, ImageInput, Scores, layer_of
from heatlens_server.backends.onnx.gradient.values import know
from heatlens_server.backends.onnx.network import NetworkInfo, NetworkLayer
from heatlens_server.backends.onnx.source.load import LoadedFile
from heatlens_server.core.errors import ExportError
from heatlens_server.core.grid import Grid
from heatlens_server.core.preprocess import PreprocessSpec
from heatlens_server.core.tasks import Task


def exported_file(
    model: ir.Model,
    *,
    scores: ir.Value,
    tensors: Mapping[str, ir.Value],
    grids: Mapping[str, Grid],
    task: Task,
    labels: tuple[str, ...],
    version: str,
    preprocess: PreprocessSpec,
    has_linear_head: bool,
    assumptions: tuple[str, ...] = (),
) -> LoadedFile:
    """What is known about a translated network.

    Args:
        model: in the form that rules know, with one input, of images (N, C, H, W).
        scores: of it, (N, classes).
        tensors: by layer, the default first, the layer's output.
        grids: by layer, how that is read as a map.
        task: of a classifier.
        labels: one per class, or empty.
        version: of the weights.
        preprocess: how an image becomes its input.
        has_linear_head: as `network.NetworkInfo`.
        assumptions: as `LoadedFile`.

    Raises:
        ExportError: a layer's output is not what its grid says.
    """
    (image,) = model.graph.inputs
    given = ImageInput(image, preprocess.channels, *preprocess.input_px, channels_last=False)
    known = know(model, image, given.shape(*preprocess.input_px))
    found: dict[str, FoundLayer] = {}
    for layer, value in tensors.items():
        grid, shape = grids[layer], known.shapes.get(value, ())
        one = layer_of(model, known, given, value, grid)
        if one is None:
            raise ExportError(f"layer {layer!r} of shape {shape} has no grid as {grid}")
        found[layer] = one
    class_count = known.shapes[scores][1]
    info = NetworkInfo(
        task=task,
        class_count=class_count,
        layers=tuple(NetworkLayer(name, one.grid, one.channels, one.height, one.width) for name, one in found.items()),
        preprocess=preprocess,
        dtype=str(known.dtype.numpy()),
        has_linear_head=has_linear_head,
    )
    return LoadedFile(
        info=info,
        labels=labels,
        version=version,
        assumptions=assumptions,
        candidates=(),
        model=model,
        known=known,
        image=given,
        scores=Scores(scores, scores, class_count, ""),
        looked_at=(),
        found_layers=tuple(found.values()),
    )
