"""A loaded model: the network and everything known about it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from heatlens_server.backends.torch.cam.grid import MAP, Grid
from heatlens_server.backends.torch.sources.output_reading import OutputReading
from heatlens_server.core.preprocess import PreprocessSpec
from heatlens_server.core.tasks import Task


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A network in fp32 on the CPU, or where its factory put it, ready for an engine to place.

    Attributes:
        name: its name in the configuration.
        version: from the configuration, or 12 hex digits derived from the weights.
        module: takes float32 (N, 3, H, W); in eval mode, no parameter requires a gradient.
        preprocess: how an image becomes its input; (H, W) is `preprocess.crop_px`.
        labels: one class name per class, or empty.
        class_count: number of classes.
        layers: names of the modules that can be explained, the default first; each runs once per forward.
        task: what it does.
        grids: how to read each layer's output as a map; a layer that is not in it returns (N, C, h, w).
        reading: how what the network returns becomes scores (N, class_count), where the task has such.
        threshold: segmentation whose classes may overlap: the sigmoid above which a pixel is predicted as a class, in
            (0, 1); None where classes exclude each other.
        assumptions: what was found or assumed when it was loaded, one sentence each, with the key that overrides it.
    """

    name: str
    version: str
    module: nn.Module
    preprocess: PreprocessSpec
    labels: tuple[str, ...]
    class_count: int
    layers: tuple[str, ...]
    task: Task = Task.CLASSIFICATION
    grids: Mapping[str, Grid] = field(default_factory=dict)
    reading: OutputReading = field(default_factory=OutputReading)
    threshold: float | None = None
    assumptions: tuple[str, ...] = ()

    def grid(self, layer: str) -> Grid:
        """How to read a layer's output as a map."""
        return self.grids.get(layer, MAP)
