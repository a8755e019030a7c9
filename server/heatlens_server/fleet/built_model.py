"""What loading a model gives."""

from dataclasses import dataclass

from heatlens_server.core.engine import SteppingEngine
from heatlens_server.core.methods import Method
from heatlens_server.core.preprocess import PreprocessSpec


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """A loaded, warmed-up model.

    Attributes:
        engine: runs it.
        preprocess: from source image to input pixels.
        version: what clients see.
        labels: one per class; empty if unknown.
        method: for requests that name none.
        assumptions: what was found or assumed when it was loaded, one sentence each, with the key that overrides it.
        layer_choices: one line for each tensor of a file that may be a layer.
        export_was_cached: whether its export was in the cache; None if it is served without one, or from a folder.
        next_engine: what takes over once `build_export` has made its graphs; empty if this is what stays.
        weights_version: of the weights, whatever the configuration says.
        others: run it beside `engine`: on further devices, or on the same one.
    """

    engine: SteppingEngine
    preprocess: PreprocessSpec
    version: str
    labels: tuple[str, ...]
    method: Method
    assumptions: tuple[str, ...] = ()
    layer_choices: tuple[str, ...] = ()
    export_was_cached: bool | None = None
    next_engine: str = ""
    weights_version: str = ""
    others: tuple[SteppingEngine, ...] = ()

    @property
    def engines(self) -> tuple[SteppingEngine, ...]:
        """All that run it."""
        return (self.engine, *self.others)

    def close(self) -> None:
        """Close every engine."""
        for engine in self.engines:
            engine.close()
