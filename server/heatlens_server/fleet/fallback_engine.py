"""Two engines for one model: an exported graph, fast at what it holds, and torch, for all the rest.

Torch is loaded when a request first needs it, and not before: it takes seconds, and the model's memory once more.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Protocol, Self, cast

from heatlens_server.config import ModelConfig
from heatlens_server.core.arrays import ImageArray
from heatlens_server.core.engine import Capabilities, Engine, MapSpec, SteppingEngine, Steps
from heatlens_server.core.errors import InvalidArgument, ModelLoadError
from heatlens_server.core.extras import is_installed
from heatlens_server.core.methods import Method, Score
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import Target
from heatlens_server.fleet.export import importing_torch, load_network

_log = logging.getLogger(__name__)

_KNOWN_SPECS = 256

_OPTIONS = ("augment", "principal_component", "faithfulness")
"""What engines without steps lack."""


class ExportEngine(Engine, Protocol):
    """An engine that runs exported graphs."""

    def can(self, spec: MapSpec) -> bool:
        """Whether the engine has the graphs that a spec needs. If it takes steps, the engine is a `SteppingEngine`."""
        ...


class FallbackEngine:
    """Runs each spec on its primary engine if that can, else on a fallback. Implements `SteppingEngine`.

    Loading and running may go on at the same time: the primary engine serves while the fallback is loaded.
    """

    def __init__(
        self,
        primary: ExportEngine,
        make_fallback: Callable[[], SteppingEngine] | None = None,
        *,
        methods: Sequence[Method] = (),
        layers: Sequence[str] = (),
    ) -> None:
        """Load nothing yet.

        Args:
            primary: runs what it can; owned from now on.
            make_fallback: makes an engine of the same model, on the same device, that has every score and option;
                raises ModelLoadError. None if there is none.
            methods: what the fallback will have, or would have if torch were installed.
            layers: the layers that it alone will have.
        """
        self.primary = primary
        self._make = make_fallback
        self._methods, self._layers = methods, layers
        self._threads: int | None = None
        # Held while the fallback is being loaded; `_state` only for an instant.
        self._loading = threading.Lock()
        self._state = threading.Lock()
        self._fallback: SteppingEngine | None = None
        self._closed = False
        # Asked for every request, and few are unlike the others.
        self._is_for_primary = lru_cache(maxsize=_KNOWN_SPECS)(primary.can)
        self._info = (
            _lacking(primary.info, methods) if make_fallback is None else _joined(primary.info, methods, layers)
        )

    @property
    def info(self) -> Capabilities:
        """What the two can do together, and take by now; the rest is the primary engine's."""
        return self._info

    def explain(self, images: ImageArray, targets: Sequence[Target], spec: MapSpec) -> list[ImageResult]:
        """Explain a batch; see `core.engine.Engine.explain`.

        Raises:
            MemoryError: the device is out of memory.
            InvalidArgument: the export has no graph for the spec, and there is no fallback.
            ModelLoadError: the fallback is needed, was not loaded before, and cannot be loaded.
        """
        engine = self.primary if self._is_for_primary(spec) else self._loaded(spec)
        return engine.explain(images, targets, spec)

    def steps(self, image: ImageArray, target: Target, spec: MapSpec, *, rows: int) -> Steps:
        """Explain one image in steps; see `core.engine.SteppingEngine.steps`."""
        engine = cast("SteppingEngine", self.primary) if self._is_for_primary(spec) else self._loaded(spec)
        return engine.steps(image, target, spec, rows=rows)

    def is_loaded_for(self, spec: MapSpec) -> bool:
        """Whether all that a spec needs is loaded."""
        return self._fallback is not None or self._make is None or self._is_for_primary(spec)

    def load_for(self, spec: MapSpec) -> None:
        """Load the fallback if a spec needs it.

        Raises:
            ModelLoadError: it cannot be loaded, or is not what it was said to be.
        """
        if not self.is_loaded_for(spec):
            self._loaded(spec)

    def use_threads(self, count: int | None) -> None:
        """Have both run on so many threads of a CPU from now on."""
        self.primary.use_threads(count)
        self._threads = count
        if self._fallback is not None:
            self._fallback.use_threads(count)

    def another(self) -> Self:
        """An engine for another thread, both parts of which share the weights."""
        make, another = self._make, self.primary.another()
        of_both = None if make is None else lambda: self._fallback_of(make).another()
        return type(self)(another, of_both, methods=self._methods, layers=self._layers)

    def close(self) -> None:
        """Close both. A fallback that is being loaded is closed once it is. Idempotent."""
        with self._state:
            self._closed = True
            fallback, self._fallback = self._fallback, None
        if fallback is not None:
            fallback.close()
        self.primary.close()

    def _loaded(self, spec: MapSpec) -> SteppingEngine:
        if self._make is None:
            layers = ", ".join(repr(layer) for layer in spec.layers)
            raise InvalidArgument.of(
                "options",
                f"the export has no graph for {spec.method} of {layers} with these options",
                reason="INVALID_OPTION",
            )
        return self._fallback_of(self._make)

    def _fallback_of(self, make: Callable[[], SteppingEngine]) -> SteppingEngine:
        if self._fallback is not None:
            return self._fallback
        with self._loading:
            return self._fallback or self._load(make)

    def _load(self, make: Callable[[], SteppingEngine]) -> SteppingEngine:
        started_at = time.monotonic()
        fallback = make()
        if self._threads is not None:
            fallback.use_threads(self._threads)
        try:
            _check(fallback.info, self._info)
            self._adopt(fallback)
        except BaseException:
            fallback.close()
            raise
        _log.info(
            "%s was loaded beside %s in %.1f s",
            fallback.info.engine_name,
            self._info.engine_name,
            time.monotonic() - started_at,
        )
        return fallback

    def _adopt(self, fallback: SteppingEngine) -> None:
        with self._state:
            if self._closed:
                raise ModelLoadError("the server is shutting down")
            self._fallback = fallback
            size_bytes = self.primary.info.weights_bytes + fallback.info.weights_bytes
            self._info = replace(self._info, weights_bytes=size_bytes)


_NO_TORCH = "the server has no PyTorch"


def _lacking(info: Capabilities, methods: Sequence[Method]) -> Capabilities:
    if not methods:
        return info
    # What torch would not have either is not missed.
    return replace(info, refusals={method: _NO_TORCH for method in methods if method not in info.methods})


def about_missing(info: Capabilities) -> tuple[str, ...]:
    """What is to be said where torch would run more than its server offers."""
    missing = [str(method) for method, why in info.refusals.items() if why == _NO_TORCH]
    if not missing:
        return ()
    scores = ["target scores other than the logit"] if len(info.scores) == 1 else []
    *first, last = [*missing, *scores, *([] if info.has_options else _OPTIONS)]
    offers = f"{', '.join(first)} and {last} are" if first else f"{last} is"
    sentence = (
        f"PyTorch is not installed, so that {offers} not offered: pip install 'heatlens[torch]' adds what is missing; "
        "companion = false does without."
    )
    return (sentence,)


def _joined(info: Capabilities, methods: Sequence[Method], layers: Sequence[str]) -> Capabilities:
    further = frozenset(methods) - frozenset(info.methods)
    return replace(
        info,
        methods=tuple(method for method in Method if method in info.methods or method in further),
        fallback_methods=further,
        layers=(*info.layers, *(layer for layer in layers if layer not in info.layers)),
        scores=tuple(Score),
        fallback_scores=frozenset(Score) - frozenset(info.scores),
        layers_by_method={},
        has_options=True,
        refusals={},
    )


def _check(found: Capabilities, said: Capabilities) -> None:
    """Check that a fallback is of the same model, and has what clients were told.

    Raises:
        ModelLoadError: it is of another model, or lacks something.
    """
    missing = [method for method in said.fallback_methods if method not in found.methods]
    if missing:
        raise ModelLoadError(f"the network, as it is now, has no {', '.join(sorted(missing))}; reload the model")
    if (found.class_count, found.task) != (said.class_count, said.task) or not set(said.layers) <= set(found.layers):
        raise ModelLoadError("the network, as it is now, is not the one that was exported; reload the model")


def with_torch_fallback(
    config: ModelConfig,
    primary: ExportEngine,
    *,
    methods: Sequence[Method],
    version: str,
    layers: Sequence[str] = (),
) -> FallbackEngine:
    """Let torch run what a graph's engine cannot, unless the configuration forbids it or torch is not installed.

    Args:
        config: the model.
        primary: the engine that runs its graphs.
        methods: what torch has for the model; none if it cannot run it.
        version: of the weights in the graphs.
        layers: the layers that torch alone has.
    """
    if not (config.companion and methods):
        return FallbackEngine(primary)
    if not is_installed("torch"):
        return FallbackEngine(primary, methods=methods)

    def make() -> SteppingEngine:
        return _load(config, version, device=primary.info.device)

    return FallbackEngine(primary, make, methods=methods, layers=layers)


def _load(config: ModelConfig, weights_version: str, *, device: str) -> SteppingEngine:
    """Load the model that was exported, on the device that runs its export.

    Raises:
        ModelLoadError: it cannot be loaded, or has other weights by now.
    """
    with importing_torch():
        import torch  # noqa: PLC0415 - takes seconds

        from heatlens_server.backends.torch.engine import TorchEngine  # noqa: PLC0415 - imports torch

    model = load_network(config)
    if model.version != weights_version:
        raise ModelLoadError("its source gives other weights than those that were loaded; reload the model")
    if config.device == "auto" and device != "cpu" and not torch.cuda.is_available():
        _log.warning("model %s: torch runs on the CPU although there is a GPU: it cannot use it", config.name)
        device = "cpu"
    return TorchEngine(model, device=device, precision=config.precision)
