"""What engines need to know of an export, from its manifest. No torch in here."""

from heatlens_server.backends.onnx.manifest import Manifest
from heatlens_server.core.engine import Capabilities, MapSpec
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.graph_spec import Format, Output
from heatlens_server.core.methods import Method
from heatlens_server.core.tasks import Task


def check_served(manifest: Manifest, wanted: Format, needed: tuple[Output, ...]) -> None:
    """Check that an export is of the format wanted and that all its graphs return what is needed.

    Raises:
        ModelLoadError: it is not, or they do not.
    """
    if manifest.format is not wanted:
        raise ModelLoadError(f"the export is {manifest.format}, not {wanted}")
    if not manifest.graphs:
        raise ModelLoadError("the export has no graphs")
    for graph in manifest.graphs:
        missing = [output for output in needed if output not in graph.outputs]
        if missing:
            raise ModelLoadError(
                f"the graph of layer {graph.layer!r} does not return {', '.join(missing)}, which a server needs: "
                "export it with more outputs"
            )


def served_info(manifest: Manifest, *, engine_name: str, device: str) -> Capabilities:
    """Describe an engine that serves an export.

    Its methods are those of the default layer, and its layers those that have one of them. What only some layers have,
    as exports hold it for the default layer alone or verification left it out by others, has `layers_by_method`.
    """
    layers = {layer: {graph.method for graph in manifest.graphs if graph.layer == layer} for layer in manifest.layers}
    of_default = layers[manifest.graphs[0].layer]
    offered = tuple(layer for layer, methods in layers.items() if methods & of_default)
    held = {method: tuple(layer for layer in offered if method in layers[layer]) for method in of_default}
    height_px, width_px = manifest.preprocess.input_px
    everywhere = {method for method in of_default if not method.traits.default_layer_only}
    offered = tuple(layer for layer, methods in layers.items() if everywhere <= methods)
    held = {method: tuple(layer for layer in offered if method in layers[layer]) for method in of_default}
    return Capabilities(
        engine_name=engine_name,
        device=device,
        precision=manifest.precision,
        input_height_px=height_px,
        input_width_px=width_px,
        class_count=manifest.class_count,
        methods=tuple(method for method in Method if method in of_default),
        layers=offered,
        task=manifest.task or Task.CLASSIFICATION,
        input_channels=manifest.preprocess.channels,
        scores=(manifest.graphs[0].score,),
        layers_by_method={method: fewer for method, fewer in held.items() if fewer != offered},
    )


def can_serve(manifest: Manifest, spec: MapSpec) -> bool:
    """Whether an export has all the graphs that a request needs, and needs nothing else."""
    graphs = {(graph.layer, graph.method, graph.score) for graph in manifest.graphs}
    return (
        not spec.in_steps
        and not spec.principal
        and not spec.return_mask
        and all((layer, spec.method, spec.score) in graphs for layer in spec.layers)
    )
