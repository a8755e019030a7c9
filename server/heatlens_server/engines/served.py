"""What engines need to know of an export, from its manifest. No torch in here."""

from heatlens_server.cam.catalog import Method
from heatlens_server.engines.base import EngineInfo
from heatlens_server.errors import ModelLoadError
from heatlens_server.export.manifest import Manifest
from heatlens_server.export.spec import Format, Output


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


def served_info(manifest: Manifest, *, kind: str, device: str) -> EngineInfo:
    """Describe an engine that serves an export.

    Its methods are those of the default layer. A layer is offered if it has all of them, but for CAM, which is for the
    default layer alone.
    """
    layers = {layer: {graph.method for graph in manifest.graphs if graph.layer == layer} for layer in manifest.layers}
    of_default = layers[manifest.graphs[0].layer]
    height_px, width_px = manifest.preprocess.crop_px
    return EngineInfo(
        kind=kind,
        device=device,
        precision=manifest.precision,
        input_height_px=height_px,
        input_width_px=width_px,
        class_count=manifest.class_count,
        methods=tuple(method for method in Method if method in of_default),
        layers=tuple(layer for layer, methods in layers.items() if of_default - {Method.CAM} <= methods),
    )
