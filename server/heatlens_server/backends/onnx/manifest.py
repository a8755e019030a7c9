"""What is in an export's folder: `manifest.json`. No torch in here: engines read it to run an export without it."""

import errno
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from heatlens_server.core.errors import ExportError
from heatlens_server.core.graph_spec import IMAGE, MANIFEST_FILE, Format, InputKind, Output
from heatlens_server.core.grid import MAP, Grid
from heatlens_server.core.methods import Method, Score
from heatlens_server.core.preprocess import PreprocessSpec
from heatlens_server.core.tasks import Task

NETWORK_FILE = "network.json"
"""Of a stored network: tells of its graphs."""

_MANIFEST_VERSION = 1
_CHUNK_BYTES = 1 << 20
# A side of the network's input. Far more than there is; one row of such a square still fits in memory.
_MOST_PX = 8192

_Positive = Annotated[int, Field(ge=1)]
_Name = Annotated[str, Field(min_length=1)]


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
        grid: how the layer's output becomes the map (N, A, h, w) that the graph explains.
        score: what is differentiated about a class.
    """

    file: _Name
    layer: _Name
    method: Method
    outputs: tuple[Output, ...]
    grid: Grid = MAP
    score: Score = Score.LOGIT


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A graph that failed verification.

    Attributes:
        layer: the target layer's module name.
        method: of its map.
        reason: with the figure, its value and its bound.
    """

    layer: str
    method: Method
    reason: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that is known about an export.

    Attributes:
        format: what the graphs are written as.
        model: the model's name.
        source: where its architecture came from, as in the configuration.
        weights_version: 12 hex digits of a SHA-256 over the weights (`sources.weights.weights_version`).
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
        parity: what `export.verify` measured, and in "left_out" what failed it; empty if it was switched off.
        task: what the model does; None in exports of versions that did not write it.
        assumptions: what was found or assumed when the model was loaded, one sentence each.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    format: Format
    model: str
    source: str
    weights_version: str
    class_count: _Positive
    labels: tuple[str, ...]
    preprocess: PreprocessSpec
    input: InputKind
    precision: Annotated[str, Field(pattern="^(fp32|fp16)$")]
    classes: _Positive | None
    graphs: Annotated[tuple[GraphFile, ...], Field(min_length=1)]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    files: Mapping[str, str]
    opset: int | None
    versions: Mapping[str, str]
    parity: Mapping[str, Any]
    task: Task | None = None
    assumptions: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that can be explained, the default first."""
        return tuple(dict.fromkeys(graph.layer for graph in self.graphs))

    @property
    def is_network(self) -> bool:
        """Whether the folder holds a network's passes (`stored.py`), of which engines make the maps."""
        return NETWORK_FILE in self.files

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """What the network has and the export lacks, since it failed verification."""
        return tuple(
            LeftOut(entry["layer"], Method(entry["method"]), entry["reason"])
            for entry in self.parity.get("left_out", ())
        )

    def write(self, folder: Path) -> None:
        """Write `manifest.json`."""
        content = {"manifest_version": _MANIFEST_VERSION, **asdict(self)}
        (folder / MANIFEST_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest, check every field, and that every file is as it was written.

    Raises:
        ExportError: there is no manifest, it is of another version or damaged, or a file is missing or differs. The
            message names the field or the file.
    """
    try:
        if not (folder / MANIFEST_FILE).is_file():
            raise FileNotFoundError
        content = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        if content.pop("manifest_version") != _MANIFEST_VERSION:
            raise ExportError(f"{MANIFEST_FILE} is of another version of heatlens")
        # As JSON, in which tuples and names of enumerations can be told apart strictly.
        manifest = _reader().validate_json(json.dumps(content), strict=True)
        _check(manifest)
    except OSError as error:
        raise ExportError(f"{MANIFEST_FILE} cannot be read ({type(error).__name__})") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ExportError(f"{MANIFEST_FILE} is damaged ({field}: {first['msg']})") from error
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ExportError(f"{MANIFEST_FILE} is damaged ({type(error).__name__})") from error
    except ValueError as error:
        raise ExportError(f"{MANIFEST_FILE} is damaged ({error})") from error
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


@cache
def _reader() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex.

    Raises:
        OSError: it cannot be read, or is no regular file: a FIFO would be waited for.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is no regular file")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _check(manifest: Manifest) -> None:
    """Check what fields say about one another.

    Raises:
        ValueError: they do not fit; the message names a field.
    """
    if manifest.labels and len(manifest.labels) != manifest.class_count:
        raise ValueError(f"labels: there are {len(manifest.labels)}, for {manifest.class_count} classes")
    if manifest.classes is not None and manifest.classes > manifest.class_count:
        raise ValueError(f"classes: {manifest.classes} of {manifest.class_count}")
    if manifest.task is not None and not manifest.task.traits.exportable:
        raise ValueError(f"task: exports are of classifiers, not for {manifest.task}")
    crop_px = manifest.preprocess.crop_px
    if crop_px is None:
        raise ValueError("preprocess.crop_px: graphs take images of one size")
    if max(crop_px) > _MOST_PX:
        raise ValueError(f"preprocess.crop_px: more than {_MOST_PX}")
    dtype = "float32" if manifest.input is InputKind.FLOAT else "uint8"
    for tensor in manifest.inputs:
        if tensor.name == IMAGE and tensor.dtype != dtype:
            raise ValueError(f"input: {manifest.input}, and the graphs take {tensor.dtype}")
        if tensor.name == IMAGE and tensor.shape[1:] != (manifest.preprocess.channels, *crop_px):
            channels = manifest.preprocess.channels
            raise ValueError(
                f"preprocess.crop_px: {crop_px}, of {channels} channels, and the graphs take {tensor.shape}"
            )


_PACKAGES = ("heatlens", "torch", "torchvision", "timm", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu")


def installed_versions() -> dict[str, str]:
    """Versions of the packages that an export depends on, those that are installed."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
