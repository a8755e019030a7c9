"""The engine against a plain forward pass of the same model, and against the grad-cam package."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from rich.table import Table

from bench.measure import take_turns
from bench.models import efficientnet_lite0, noise_images, resnet50
from heatlens_server.cam.catalog import Method
from heatlens_server.engines.base import MapSpec, TopK
from heatlens_server.engines.torch_engine import TorchEngine
from heatlens_server.models.spec import LoadedModel

BATCH_SIZES = (1, 8)
MAX_OF_FORWARD = 1.10
MIN_OF_GRAD_CAM = 2.5


def run(*, turns: int) -> Table:
    """Measure and tabulate."""
    table = Table(title="engine: explain (uint8 in, Grad-CAM map out) against others, same model, same run")
    for column in ("model", "batch", "explain ms", "/ forward", "/ forward NCHW", "grad-cam / explain", "targets"):
        table.add_column(column, justify="right")
    for make in (efficientnet_lite0, resnet50):
        for batch_size in BATCH_SIZES:
            table.add_row(*_row(make, batch_size, turns))
    table.caption = (
        "forward = the same module in inference_mode on float input, channels_last like the engine; NCHW = in torch's "
        f"default layout. Targets at batch 8: <= {MAX_OF_FORWARD}x forward, >= {MIN_OF_GRAD_CAM}x faster than grad-cam."
    )
    return table


def _row(make: Callable[[], LoadedModel], batch_size: int, turns: int) -> list[str]:
    model = make()
    # grad-cam wants parameters that require gradients, and the default layout is what its users run.
    plain = copy.deepcopy(model.module).to(memory_format=torch.contiguous_format).requires_grad_(requires_grad=True)
    engine = TorchEngine(model, device="cpu")
    layer = model.layers[0]
    images = noise_images(batch_size)
    spec = MapSpec(Method.GRAD_CAM, (layer,), upsample=False)
    mean, std = (np.array(values, np.float32) for values in (model.preprocess.mean, model.preprocess.std))
    inputs = torch.from_numpy((images / np.float32(255) - mean) / std).permute(0, 3, 1, 2)
    contiguous = inputs.contiguous()

    def forward(module: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return module(batch)

    with GradCAM(plain, [plain.get_submodule(layer)]) as grad_cam:
        targets = [ClassifierOutputTarget(0)] * batch_size
        measured = take_turns(
            {
                "explain": lambda: engine.explain(images, [TopK(1)] * batch_size, spec),
                "forward": lambda: forward(model.module, inputs),
                "forward NCHW": lambda: forward(plain, contiguous),
                "grad-cam": lambda: grad_cam(contiguous, targets),
            },
            turns=turns if batch_size > 1 else 3 * turns,
        )
    engine.close()
    of_forward = measured.ratio("explain", "forward")
    of_grad_cam = 1 / measured.ratio("explain", "grad-cam")
    met = of_forward <= MAX_OF_FORWARD and of_grad_cam >= MIN_OF_GRAD_CAM
    return [
        model.name,
        str(batch_size),
        f"{measured.median_ms('explain'):.1f}",
        f"{of_forward:.3f}",
        f"{measured.ratio('explain', 'forward NCHW'):.3f}",
        f"{of_grad_cam:.2f}x",
        "" if batch_size == 1 else ("met" if met else "MISSED"),
    ]
