"""Torch beside an export. It is not imported before it is needed, and then in the middle of serving."""

import logging

from heatlens_server.building.abilities import read_abilities
from heatlens_server.building.artefact import Artefact, LazyModel
from heatlens_server.config import ModelConfig
from heatlens_server.engines.base import SteppingEngine
from heatlens_server.engines.companion import CompanionEngine, ExportEngine
from heatlens_server.errors import ModelLoadError

_log = logging.getLogger(__name__)


def with_companion(config: ModelConfig, primary: ExportEngine, artefact: Artefact) -> CompanionEngine:
    """Put torch beside an engine that runs a model's export, for what that has not.

    Args:
        config: the model; not an export of somebody else's.
        primary: the engine.
        artefact: what it runs.
    """
    if not config.companion:
        return CompanionEngine(primary)

    def make() -> SteppingEngine:
        return _load(config, artefact.manifest.weights_version, device=primary.info.device)

    return CompanionEngine(primary, make, methods=read_abilities(artefact.folder, artefact.manifest))


def _load(config: ModelConfig, weights_version: str, *, device: str) -> SteppingEngine:
    """Load the model that was exported, on the device that runs its export.

    Raises:
        ModelLoadError: it cannot be loaded, or has other weights by now.
    """
    import torch  # noqa: PLC0415 - takes seconds

    from heatlens_server.engines.torch_engine import TorchEngine  # noqa: PLC0415 - imports torch

    model = LazyModel(config).get()
    if model.version != weights_version:
        raise ModelLoadError("its source gives other weights than those that were exported; restart the server")
    if config.device == "auto" and device != "cpu" and not torch.cuda.is_available():
        _log.warning("model %s: torch runs on the CPU although there is a GPU: it cannot use it", config.name)
        device = "cpu"
    return TorchEngine(model, device=device, precision=config.precision)
