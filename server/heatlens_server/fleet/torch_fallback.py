"""An engine of an export, and torch beside it, which is not imported before it is needed: in the middle of serving."""

import logging

from heatlens_server.config import EXPORT_PREFIX, ModelConfig
from heatlens_server.core.engine import SteppingEngine
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.fleet.artefact import Artefact, LazyModel
from heatlens_server.fleet.fallback_engine import ExportEngine, FallbackEngine
from heatlens_server.fleet.torch_import import importing_torch
from heatlens_server.fleet.torch_methods import read_abilities

_log = logging.getLogger(__name__)


def with_companion(config: ModelConfig, primary: ExportEngine, artefact: Artefact) -> FallbackEngine:
    """Put torch beside an engine that runs a model's export, for what that has not, unless it is not to be.

    Args:
        config: the model.
        primary: the engine.
        artefact: what it runs.
    """
    # Of an export that somebody gives us there is no network.
    if not config.companion or config.source.startswith(EXPORT_PREFIX):
        return FallbackEngine(primary)

    def make() -> SteppingEngine:
        return _load(config, artefact.manifest.weights_version, device=primary.info.device)

    methods = read_abilities(artefact.folder, artefact.manifest)
    return FallbackEngine(primary, make, methods=methods)


def _load(config: ModelConfig, weights_version: str, *, device: str) -> SteppingEngine:
    """Load the model that was exported, on the device that runs its export.

    Raises:
        ModelLoadError: it cannot be loaded, or has other weights by now.
    """
    with importing_torch:
        import torch  # noqa: PLC0415 - takes seconds

        from heatlens_server.backends.torch.engine import TorchEngine  # noqa: PLC0415 - imports torch

    model = LazyModel(config).get()
    if model.version != weights_version:
        raise ModelLoadError("its source gives other weights than those that were exported; restart the server")
    if config.device == "auto" and device != "cpu" and not torch.cuda.is_available():
        _log.warning("model %s: torch runs on the CPU although there is a GPU: it cannot use it", config.name)
        device = "cpu"
    return TorchEngine(model, device=device, precision=config.precision)
