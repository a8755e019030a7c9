"""What is in an export's folder: `manifest.json`. No torch in here: engines read it to run an export without it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from heatlens_server.cam.catalog import Method
from heatlens_server.errors import ExportError
from heatlens_server.export.spec import Format, InputKind, Output
from heatlens_server.imaging.preprocess import Interpolation, PreprocessSpec

MANIFEST_FILE = "manifest.json"
_MANIFEST_VERSION = 1
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """An input or output of the graphs.

    Attributes:
        name: as in the graph.
        dtype: "float32", "int64", "uint8".
        shape: numbers, and names for what may vary: "batch", "classes".
        meaning: one line for people.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    meaning: str


@dataclass(frozen=True, slots=True)
class GraphFile:
    """One graph of the folder.

    Attributes:
        file: its file name.
        layer: the target layer's module name.
        method: of the map in the graph.
        outputs: what it returns, in order.
    """

    file: str
    layer: str
    method: Method
    outputs: tuple[Output, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that is known about an export.

    Attributes:
        format: what the graphs are written as.
        model: the model's name.
        source: where its architecture came from, as in the configuration.
        weights_version: 12 hex digits of a SHA-256 over the weights (`models.weights.weights_version`).
        class_count: number of classes.
        labels: one per class, or empty.
        preprocess: how an image becomes `image`.
        input: what `image` holds.
        precision: of the network, "fp32" or "fp16".
        classes: K, or None for any.
        graphs: the default one first.
        inputs: of every graph.
        outputs: of the first graph.
        files: SHA-256 of every other file in the folder, by name.
        opset: of ONNX; None in other formats.
        versions: of the packages that made the export, by name.
        parity: what `export.verify` measured; empty if it was switched off.
    """

    format: Format
    model: str
    source: str
    weights_version: str
    class_count: int
    labels: tuple[str, ...]
    preprocess: PreprocessSpec
    input: InputKind
    precision: str
    classes: int | None
    graphs: tuple[GraphFile, ...]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    files: Mapping[str, str]
    opset: int | None
    versions: Mapping[str, str]
    parity: Mapping[str, Any]

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that can be explained, the default first."""
        return tuple(dict.fromkeys(graph.layer for graph in self.graphs))

    def write(self, folder: Path) -> None:
        """Write `manifest.json`."""
        content = {"manifest_version": _MANIFEST_VERSION, **asdict(self)}
        (folder / MANIFEST_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest, and check that every file is as it was written.

    Raises:
        ExportError: there is no manifest, it is of another version or damaged, or a file is missing or differs.
    """
    try:
        content = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        if content.pop("manifest_version") != _MANIFEST_VERSION:
            raise ExportError(f"{MANIFEST_FILE} is of another version of heatlens")
        manifest = _parse(content)
    except OSError as error:
        raise ExportError(f"{MANIFEST_FILE} cannot be read ({type(error).__name__})") from error
    # Whatever is missing, misspelt or of another type.
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ExportError(f"{MANIFEST_FILE} is damaged ({type(error).__name__})") from error
    for name, expected in manifest.files.items():
        # A manifest from elsewhere may not reach out of its folder.
        if Path(name).name != name:
            raise ExportError(f"{MANIFEST_FILE} names a file outside of its folder")
        try:
            found = sha256_of(folder / name)
        except OSError as error:
            raise ExportError(f"{name} cannot be read ({type(error).__name__})") from error
        if found != expected:
            raise ExportError(f"{name} is not the file that was exported")
    if not {graph.file for graph in manifest.graphs} <= set(manifest.files):
        raise ExportError(f"{MANIFEST_FILE} is damaged (a graph without a file)")
    return manifest


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _parse(content: dict[str, Any]) -> Manifest:
    preprocess = content["preprocess"]
    resize_px = preprocess["resize_px"]
    return Manifest(
        **{
            **content,
            "format": Format(content["format"]),
            "labels": tuple(content["labels"]),
            "preprocess": PreprocessSpec(
                resize_px=resize_px if isinstance(resize_px, int) else tuple(resize_px),
                crop_px=tuple(preprocess["crop_px"]),
                mean=tuple(preprocess["mean"]),
                std=tuple(preprocess["std"]),
                interpolation=Interpolation(preprocess["interpolation"]),
            ),
            "input": InputKind(content["input"]),
            "graphs": tuple(_graph(graph) for graph in content["graphs"]),
            "inputs": tuple(_tensor(tensor) for tensor in content["inputs"]),
            "outputs": tuple(_tensor(tensor) for tensor in content["outputs"]),
        }
    )


def _graph(content: dict[str, Any]) -> GraphFile:
    outputs = tuple(Output(output) for output in content["outputs"])
    return GraphFile(content["file"], content["layer"], Method(content["method"]), outputs)


def _tensor(content: dict[str, Any]) -> TensorInfo:
    return TensorInfo(content["name"], content["dtype"], tuple(content["shape"]), content["meaning"])
