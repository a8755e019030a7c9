"""One way to run a model, in a process of its own: `python -m bench.candidate KIND MODEL BATCH_SIZE FOLDER`.

Says "ready", then for every line it reads runs once and says how many seconds that took. Processes, because thread
pools that spin, allocators and memory layouts of one library slow down another in the same process.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from heatlens_server.allocator import keep_freed_memory
from heatlens_server.core.engine import Engine, MapSpec
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import TopK

FORWARD, TUNED, GRAD_CAM = "forward", "forward tuned", "grad-cam"
TORCH, ONNXRUNTIME, TORCHSCRIPT = "torch", "onnxruntime", "torchscript"
ENGINES = (TORCH, ONNXRUNTIME, TORCHSCRIPT)
PLAIN = (FORWARD, GRAD_CAM)
"""What runs as PyTorch's users run it: default layout, and the C library's default allocator."""


def main(kind: str, model: str, batch_size: int, folder: Path) -> None:
    """Serve runs until standard input ends."""
    if kind not in PLAIN:
        keep_freed_memory()
    run = _engine(kind, model, batch_size, folder) if kind in ENGINES else _torch(kind, model, batch_size)
    run()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for _ in sys.stdin:
        started = time.perf_counter()
        run()
        sys.stdout.write(f"{time.perf_counter() - started}\n")
        sys.stdout.flush()


def _engine(kind: str, model: str, batch_size: int, folder: Path) -> Callable[[], object]:
    engine: Engine
    if kind == TORCH:
        from bench import models  # noqa: PLC0415 - only what this one runs
        from heatlens_server.backends.torch.engine import TorchEngine  # noqa: PLC0415 - only what this one runs

        engine = TorchEngine(getattr(models, model)(), device="cpu")
    else:
        from heatlens_server.backends.onnx.manifest import read_manifest  # noqa: PLC0415 - only what this one runs

        of_kind = folder / kind
        if kind == ONNXRUNTIME:
            from heatlens_server.backends.onnx.network_engine import NetworkEngine  # noqa: PLC0415 - only what this one runs
            from heatlens_server.backends.onnx.stored import read_network  # noqa: PLC0415 - only what this one runs

            engine = NetworkEngine(read_network(of_kind, read_manifest(of_kind)), device="cpu")
        else:
            from heatlens_server.backends.torch.torchscript_engine import TorchScriptEngine  # noqa: PLC0415 - only what this one runs

            engine = TorchScriptEngine(of_kind, read_manifest(of_kind), device="cpu")
    spec = MapSpec(Method.GRAD_CAM, engine.info.layers[:1], upsample=False)
    height_px, width_px = engine.info.input_height_px, engine.info.input_width_px
    images = np.random.default_rng(0).integers(0, 256, (batch_size, height_px, width_px, 3), dtype=np.uint8)
    return lambda: engine.explain(images, [TopK(1)] * batch_size, spec)


def _torch(kind: str, model: str, batch_size: int) -> Callable[[], object]:
    import torch  # noqa: PLC0415 - only what this one runs

    from bench import models  # noqa: PLC0415 - only what this one runs

    loaded = getattr(models, model)()
    module: torch.nn.Module = loaded.module
    inputs = torch.randn(batch_size, 3, *loaded.preprocess.input_px, generator=torch.Generator().manual_seed(0))
    if kind == GRAD_CAM:
        from pytorch_grad_cam import GradCAM  # noqa: PLC0415 - only what this one runs
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget  # noqa: PLC0415 - only what this one runs

        # The package wants parameters that require gradients.
        module.requires_grad_(requires_grad=True)
        grad_cam = GradCAM(module, [module.get_submodule(loaded.layers[0])])
        targets = [ClassifierOutputTarget(0)] * batch_size
        return lambda: grad_cam(inputs, targets)
    if kind == TUNED:
        module = module.to(memory_format=torch.channels_last)
        inputs = inputs.to(memory_format=torch.channels_last)

    def forward() -> object:
        with torch.inference_mode():
            return module(inputs)

    return forward


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
