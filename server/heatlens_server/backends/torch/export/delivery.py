"""An export for people: in its folder whole and verified, or not at all."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from heatlens_server.backends.onnx.delivery import check_folder, delivered
from heatlens_server.backends.onnx.manifest import Manifest, read_manifest
from heatlens_server.backends.onnx.source.export import export_file
from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.backends.torch.export.folder import Report, export_graph
from heatlens_server.backends.torch.export.network import as_file
from heatlens_server.backends.torch.export.verify import verify as verify_export
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.core.errors import ExportError
from heatlens_server.core.graph_spec import Format, GraphSpec
from heatlens_server.core.methods import Method


def export_model(
    model: LoadedModel,
    spec: GraphSpec,
    *,
    file_format: Format,
    source: str,
    folder: Path,
    verify: bool,
    report: Report,
) -> Manifest:
    """Export one graph of a model into a folder.

    Args:
        model: left as it was.
        spec: which graph.
        file_format: what it is written as.
        source: where the architecture came from, for the manifest.
        folder: new, empty, or an earlier export, which is replaced once this one is done.
        verify: whether to run the export and compare it with the network in float64.
        report: told each phase.

    Returns:
        The manifest, as written.

    Raises:
        ExportError: the model is no classifier, the folder holds something else, the model cannot be exported like
            this, or the export is wrong. The folder is as it was.
    """
    if not model.task.traits.exportable:
        raise ExportError(f"exports are of classifiers, and this model is for {model.task}")
    check_folder(folder)
    judge = partial(verify_export, model, report=report) if verify else None
    if file_format is Format.ONNX:
        loaded = as_file(
            replace(model, layers=(spec.layer,)),
            precision=spec.precision,
            has_linear_head=spec.method is Method.CAM,
            report=report,
        )
        return export_file(loaded, spec, name=model.name, source=source, folder=folder, judge=judge, report=report)
    with delivered(folder) as staging:
        manifest = export_graph(model, spec, file_format=file_format, source=source, folder=staging, report=report)
        manifest.write(staging)
        if judge is not None:
            # What is judged is what a reader of the folder gets.
            manifest = read_manifest(staging)
            manifest = replace(manifest, parity=judge(staging, manifest))
            manifest.write(staging)
    return manifest


def methods_of(model: LoadedModel) -> tuple[Method, ...]:
    """Ask the reference engine which closed forms a model's first layer has.

    Raises:
        ModelLoadError: it cannot explain the model.
    """
    engine = TorchEngine(model, device="cpu")
    engine.close()
    # The engine has laid the weights out for itself.
    model.module.to(memory_format=torch.contiguous_format)
    return tuple(method for method in engine.info.methods if method.traits.exportable)
