"""Jobs on a network for tests of methods in steps, and a generator that is run to its end."""

import dataclasses
from collections.abc import Callable, Generator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from heatlens_server.backends.torch.cam.grid import Grid, LayerOutput
from heatlens_server.backends.torch.goals.table import task_model
from heatlens_server.backends.torch.network.network import TorchModel
from heatlens_server.backends.torch.stepping import TorchJob, TorchNetwork
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.methods import Method, Score
from heatlens_server.core.targets import Target
from loaded_models import loaded


def placed(
    module: nn.Module,
    layer: str,
    *,
    grids: Mapping[str, Grid] | None = None,
    px: int = 64,
    class_count: int = 10,
    precision: str = "fp32",
) -> TorchModel:
    """A classifier with one layer to explain."""
    model = dataclasses.replace(loaded(module, (layer,), class_count=class_count, px=px), grids=grids or {})
    return TorchModel(model, task_model(model), device="cpu", precision=precision)


def job(model: TorchModel, image: np.ndarray, target: Target, *, rows: int, score: Score = Score.LOGIT) -> TorchJob:
    """One image, uint8 (H, W, 3), to explain by the model's first layer."""
    spec = MapSpec(Method.SCORE_CAM, model.model.layers[:1], upsample=False, score=score)
    (found,) = TorchNetwork(model).jobs(model.inputs(image[None]), target, spec, rows=rows)
    return found


def drain(steps: Generator[None, None, Tensor]) -> tuple[Tensor, int]:
    """What a stepper returns, and in how many steps."""
    count = 0
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value, count
        count += 1


def one_by_one(
    model: TorchModel, inputs: Tensor, layer: str, change: Callable[[LayerOutput], LayerOutput], rows: int
) -> Tensor:
    """What `TorchModel.replay` must say, with one whole run of the network per row and a hook of the test's own."""
    found = []
    for row in range(rows):
        handle = model.module.get_submodule(layer).register_forward_hook(
            lambda _module, _args, output, row=row: change(output)[row : row + 1]
        )
        with torch.no_grad():
            found.append(model.run(inputs))
        handle.remove()
    return torch.cat(found)
