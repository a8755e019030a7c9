"""A network of PyTorch, as methods of many runs, smoothing and measures of faithfulness take it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heatlens_server.backends.torch.cam.grid import LayerOutput, from_levels, levels_of
from heatlens_server.backends.torch.goals.base import Goals
from heatlens_server.backends.torch.network.network import TorchModel
from heatlens_server.backends.torch.passes.one_pass import PassSteps, RawMaps, leaf_of
from heatlens_server.backends.torch.passes.table import explain
from heatlens_server.core.arrays import ImageArray
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.targets import Target
from heatlens_server.maps.precision import at_least_float32
from heatlens_server.maps.steps.job import Change, Job


@dataclass(frozen=True, slots=True, eq=False)
class TorchJob(Job):
    """One image that is explained in steps. Implements `maps.steps.job.Job`.

    Attributes:
        model: the network.
        output: what the layer returned for the image, detached.
    """

    goals: Goals
    model: TorchModel
    output: LayerOutput

    @property
    def features(self) -> Tensor:
        """The layer's output as a map (1, C, h, w)."""
        return self.model.features(self.layer, self.output)

    @property
    def levels(self) -> Sequence[Tensor]:
        """The maps that the layer's output is made of."""
        return levels_of(self.output, self.grid)

    def on_image(self, features: Tensor) -> Tensor:
        """The part of the layer's map that lies on the image."""
        return self.model.on_image(features, self.size_px)

    def scores_of_inputs(self, inputs: Tensor) -> Tensor:
        """The scores of changed images."""
        with torch.no_grad():
            return self.goals.scores_of(0, self.model.run(inputs)).float()

    def probabilities_of_inputs(self, inputs: Tensor) -> Tensor:
        """The probabilities of changed images."""
        with torch.no_grad():
            return self.goals.probabilities(0, self.model.run(inputs))

    def scores_of_levels(self, change: Change, rows: int) -> Tensor:
        """The scores of the image with the layer's output changed."""

        def changed(output: LayerOutput) -> LayerOutput:
            return from_levels(change(levels_of(output, self.grid)), output, self.grid)

        with torch.no_grad():
            return self.goals.scores_of(0, self.model.replay(self.inputs, self.layer, changed, rows)).float()

    def gradients(self, inputs: Tensor) -> Iterator[Tensor]:
        """For each goal its score's gradients for changed images. Resumed with gradients enabled."""
        output, outputs = self.model.record(inputs, (self.layer,), differentiate=True)
        leaf = leaf_of(outputs[self.layer])
        scores = self.goals.scores_of(0, output).sum(dim=0)
        for k, score in enumerate(scores):
            # A goal that none of the changed images has is a constant.
            (gradient,) = (
                self.model.gradients(score, (leaf,), retain_graph=k + 1 < len(scores))
                if score.requires_grad
                else (torch.zeros_like(leaf),)
            )
            yield at_least_float32(self.model.features(self.layer, gradient))

    def explained(self, raw: Sequence[Tensor]) -> RawMaps:
        """The image, explained by raw maps, one per layer."""
        return RawMaps(self.goals, list(raw))


@dataclass(frozen=True, slots=True, eq=False)
class TorchNetwork:
    """A network. Implements `maps.steps.network.Network`.

    Attributes:
        model: the network.
    """

    model: TorchModel

    def inputs(self, images: ImageArray) -> Tensor:
        """Images (N, H, W, C) as normalised inputs (N, C, H, W)."""
        return self.model.inputs(images)

    def explain(self, inputs: Tensor, targets: Sequence[Target], spec: MapSpec) -> PassSteps:
        """Explain inputs, goal by goal."""
        return explain(self.model, inputs, targets, spec)

    def jobs(self, inputs: Tensor, target: Target, spec: MapSpec, *, rows: int) -> list[TorchJob]:
        """Run the network on one image, for what explains it by each layer."""
        with torch.no_grad():
            output, outputs = self.model.record(inputs, spec.layers, differentiate=False)
            goals = self.model.task.goals(output, [target], score=spec.score, run=self.model.run_images)
        return [
            TorchJob(inputs, goals, layer, self.model.model.grid(layer), rows, self.model, outputs[layer])
            for layer in spec.layers
        ]

    def twin(self) -> "TorchNetwork":
        """The same network with weights that mean nothing."""
        return TorchNetwork(self.model.twin())
