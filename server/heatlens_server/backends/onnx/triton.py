"""A model in a Triton model repository: an export as its version 1, and how Triton's onnxruntime backend runs it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from heatlens_server.backends.onnx.manifest import Manifest, TensorInfo
from heatlens_server.core.errors import ExportError
from heatlens_server.core.graph_spec import MANIFEST_FILE, Output

CONFIG_FILE = "config.pbtxt"
LABELS_FILE = "labels.txt"

_VERSION = "1"
_TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64", "uint8": "TYPE_UINT8"}

_MOST_QUEUED = 256
"""As many requests wait as by default in our server, `max_queue_length`. Triton's own default is any number."""


def version_folder(repository: Path, model: str) -> Path:
    """Where the export of a model goes in a repository.

    Raises:
        ExportError: the model's folder holds something else.
    """
    folder = repository / model
    version = folder / _VERSION
    try:
        foreign = folder.exists() and any(folder.iterdir()) and not (version / MANIFEST_FILE).exists()
    except OSError as error:
        raise ExportError(f"{folder} cannot be read ({error.strerror or type(error).__name__})") from error
    if foreign:
        raise ExportError(f"{folder} holds a model that heatlens did not write: choose another repository")
    return version


def write_config(
    folder: Path, manifest: Manifest, *, max_batch_size: int, devices: Sequence[str], instances: int = 1
) -> None:
    """Write config.pbtxt and the labels beside a version's folder.

    Args:
        folder: of the version, which holds the export.
        manifest: of the export, in ONNX.
        max_batch_size: most images that Triton runs at once; 1 and no batching where the graph takes one image.
        devices: "auto", "cpu", "cuda" or "cuda:N", one or several.
        instances: on each of them.

    Raises:
        ExportError: it cannot be written.
    """
    config, labels = folder.parent / CONFIG_FILE, folder.parent / LABELS_FILE
    try:
        labels.unlink(missing_ok=True)
        if manifest.labels:
            # A label is a line.
            labels.write_text("".join(f"{' '.join(label.split())}\n" for label in manifest.labels), encoding="utf-8")
        lines = (*_config(manifest, max_batch_size), *_instances(devices, instances))
        config.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except OSError as error:
        raise ExportError(f"{folder.parent} cannot be written ({error.strerror or type(error).__name__})") from error


def _config(manifest: Manifest, max_batch_size: int) -> Iterator[str]:
    """Lines of config.pbtxt, which is Triton's ModelConfig as protobuf's text: all but the instances."""
    batched = isinstance(manifest.inputs[0].shape[0], str)
    yield f"# Written by heatlens-server export. {_VERSION}/{MANIFEST_FILE} says how images are prepared."
    yield f'name: "{manifest.model}"'
    yield 'backend: "onnxruntime"'
    yield f'default_model_filename: "{manifest.graphs[0].file}"'
    # Where it is 0, shapes are those of the graph; else they lack the batch.
    yield f"max_batch_size: {max_batch_size if batched else 0}"
    for key, tensors in (("input", manifest.inputs), ("output", manifest.outputs)):
        for tensor in tensors:
            yield f"# {tensor.meaning}"
            named = f', label_filename: "{LABELS_FILE}"' if tensor.name == Output.LOGITS and manifest.labels else ""
            yield f'{key} {{ name: "{tensor.name}", {_shape(tensor, batched=batched)}{named} }}'
    if batched:
        yield "# An idle instance takes a request at once; requests that come while it is busy share its next run."
        yield f"dynamic_batching {{ default_queue_policy {{ max_queue_size: {_MOST_QUEUED} }} }}"
    yield "# onnxruntime plans a batch size when it first runs it."
    for size in dict.fromkeys((1, max_batch_size) if batched else (1,)):
        yield f'model_warmup {{ name: "{size}", batch_size: {size}'
        for tensor in manifest.inputs:
            # Class 0 is one of every model's; any number of classes is one here.
            shape = _shape(tensor, batched=batched, free=1)
            yield f'  inputs {{ key: "{tensor.name}", value {{ {shape}, zero_data: true }} }}'
        yield "}"


def _shape(tensor: TensorInfo, *, batched: bool, free: int = -1) -> str:
    lengths = (length if isinstance(length, int) else free for length in tensor.shape[batched:])
    return f"data_type: {_TYPES[tensor.dtype]}, dims: [ {', '.join(map(str, lengths))} ]"


def _instances(devices: Sequence[str], count: int) -> Iterator[str]:
    """Instances on each device. KIND_AUTO is every GPU that there is, or else the CPU."""
    for device in devices:
        kind, _, number = device.partition(":")
        gpus = f", gpus: [ {number} ]" if number else ""
        yield f"instance_group {{ count: {count}, kind: KIND_{'GPU' if kind == 'cuda' else kind.upper()}{gpus} }}"
