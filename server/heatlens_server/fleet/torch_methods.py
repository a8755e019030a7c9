"""What torch has for a model, told without torch: found when the model is exported, and kept in the export's folder."""

import json
from collections.abc import Sequence
from pathlib import Path

from heatlens_server.backends.onnx.manifest import Manifest, sha256_of
from heatlens_server.core.methods import Method

_FILE = "torch.json"


def keep_abilities(folder: Path, methods: Sequence[Method]) -> dict[str, str]:
    """Write the methods that the torch engine has for a model.

    Args:
        folder: of the export.
        methods: its `info.methods`.

    Returns:
        The new file's SHA-256 by its name, for `Manifest.files`.
    """
    path = folder / _FILE
    path.write_text(json.dumps({"methods": list(methods)}) + "\n", encoding="utf-8")
    return {_FILE: sha256_of(path)}


def read_abilities(folder: Path, manifest: Manifest) -> tuple[Method, ...]:
    """What was kept; nothing if nothing was.

    Args:
        folder: of the export.
        manifest: of the export, from `read_manifest`: its files are as they were written.
    """
    if _FILE not in manifest.files:
        return ()
    kept = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    return tuple(Method(name) for name in kept["methods"])
