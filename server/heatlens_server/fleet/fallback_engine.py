"""Two engines for one model: an exported graph, fast at what it holds, and torch, for all the rest. No torch in here.

Torch is loaded when it is first needed, and not before: it takes seconds, and the model's memory once more.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Protocol

from heatlens_server.core.arrays import UInt8Array
from heatlens_server.core.engine import Capabilities, Engine, MapSpec, SteppingEngine, Steps
from heatlens_server.core.errors import InvalidArgument, ModelLoadError
from heatlens_server.core.methods import Method, Score
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import Target

_log = logging.getLogger(__name__)

_KNOWN_SPECS = 256


class ExportEngine(Engine, Protocol):
    """An engine that runs exported graphs."""

    def can(self, spec: MapSpec) -> bool:
        """Whether the export has the graphs that a spec needs."""
        ...


class FallbackEngine:
    """Runs each spec on its primary engine if that can, else on a companion. Implements `SteppingEngine`.

    Loading and running may go on at the same time: the primary engine serves while the companion is loaded.
    """

    def __init__(
        self,
        primary: ExportEngine,
        make_companion: Callable[[], SteppingEngine] | None = None,
        *,
        methods: Sequence[Method] = (),
    ) -> None:
        """Load nothing yet.

        Args:
            primary: runs what it can; owned from now on.
            make_companion: makes an engine of the same model, on the same device, that has every score and option;
                raises ModelLoadError. None if there is none.
            methods: what the companion will have.
        """
        self.primary = primary
        self._make = make_companion
        # Held while the companion is being loaded; `_state` only for an instant.
        self._loading = threading.Lock()
        self._state = threading.Lock()
        self._companion: SteppingEngine | None = None
        self._closed = False
        # Asked for every request, and few are unlike the others.
        self._is_for_primary = lru_cache(maxsize=_KNOWN_SPECS)(primary.can)
        self._info = primary.info if make_companion is None else _joined(primary.info, methods)

    @property
    def info(self) -> Capabilities:
        """What the two can do together; the rest is the primary engine's."""
        return self._info

    def explain(self, images: UInt8Array, targets: Sequence[Target], spec: MapSpec) -> list[ImageResult]:
        """Explain a batch; see `core.engine.Engine.explain`.

        Raises:
            MemoryError: the device is out of memory.
            InvalidArgument: the export has no graph for the spec, and there is no companion.
            ModelLoadError: the companion is needed, was not loaded before, and cannot be loaded.
        """
        engine = self.primary if self._is_for_primary(spec) else self._loaded(spec)
        return engine.explain(images, targets, spec)

    def steps(self, image: UInt8Array, target: Target, spec: MapSpec, *, rows: int) -> Steps:
        """Explain one image in steps; see `core.engine.SteppingEngine.steps`."""
        return self._loaded(spec).steps(image, target, spec, rows=rows)

    def is_loaded_for(self, spec: MapSpec) -> bool:
        """Whether all that a spec needs is loaded."""
        return self._companion is not None or self._make is None or self._is_for_primary(spec)

    def load_for(self, spec: MapSpec) -> None:
        """Load the companion if a spec needs it.

        Raises:
            ModelLoadError: it cannot be loaded, or is not what it was said to be.
        """
        if not self.is_loaded_for(spec):
            self._loaded(spec)

    def close(self) -> None:
        """Close both. A companion that is being loaded is closed once it is. Idempotent."""
        with self._state:
            self._closed = True
            companion, self._companion = self._companion, None
        if companion is not None:
            companion.close()
        self.primary.close()

    def _loaded(self, spec: MapSpec) -> SteppingEngine:
        companion = self._companion
        if companion is not None:
            return companion
        if self._make is None:
            layers = ", ".join(repr(layer) for layer in spec.layers)
            raise InvalidArgument.of(
                "options",
                f"the export has no graph for {spec.method} of {layers} with these options",
                reason="INVALID_OPTION",
            )
        with self._loading:
            return self._companion or self._load(self._make)

    def _load(self, make: Callable[[], SteppingEngine]) -> SteppingEngine:
        started_at = time.monotonic()
        companion = make()
        try:
            _check(companion.info, self._info)
            self._adopt(companion)
        except BaseException:
            companion.close()
            raise
        _log.info(
            "%s was loaded beside %s in %.1f s",
            companion.info.engine_name,
            self._info.engine_name,
            time.monotonic() - started_at,
        )
        return companion

    def _adopt(self, companion: SteppingEngine) -> None:
        with self._state:
            if self._closed:
                raise ModelLoadError("the server is shutting down")
            self._companion = companion


def _joined(info: Capabilities, methods: Sequence[Method]) -> Capabilities:
    further = frozenset(methods) - frozenset(info.methods)
    return replace(
        info,
        methods=tuple(method for method in Method if method in info.methods or method in further),
        fallback_methods=further,
        scores=tuple(Score),
        fallback_scores=frozenset(Score) - frozenset(info.scores),
        layers_by_method={},
        has_options=True,
    )


def _check(found: Capabilities, said: Capabilities) -> None:
    """Check that a companion is of the same model, and has what clients were told.

    Raises:
        ModelLoadError: it is not, or has not.
    """
    missing = [method for method in said.fallback_methods if method not in found.methods]
    if missing:
        raise ModelLoadError(f"the network, as it is now, has no {', '.join(sorted(missing))}; restart the server")
    if (found.class_count, found.task) != (said.class_count, said.task) or not set(said.layers) <= set(found.layers):
        raise ModelLoadError("the network, as it is now, is not the one that was exported; restart the server")
