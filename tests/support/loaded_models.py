"""Loaded models and images for engine tests, exports that are made once per run, and a reference in float64."""

import copy
import dataclasses
import fcntl
import hashlib
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from heatlens_server.backends.onnx.manifest import Manifest
from heatlens_server.backends.torch.cam.saliency import saliency
from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.backends.torch.export.delivery import export_model
from heatlens_server.backends.torch.export.folder import export_bundle
from heatlens_server.backends.torch.export.network import export_network
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.backends.torch.sources.weights import weights_version
from heatlens_server.core.graph_spec import Format, GraphSpec
from heatlens_server.core.methods import Method
from heatlens_server.core.preprocess import Interpolation, PreprocessSpec
from heatlens_server.maps.methods import raw_map
from server_toml import MEAN, STD

PREPROCESS = PreprocessSpec(resize_px=64, crop_px=(64, 64), mean=MEAN, std=STD, interpolation=Interpolation.BILINEAR)


def loaded(
    module: nn.Module,
    layers: Sequence[str] = ("body",),
    *,
    class_count: int = 10,
    px: int = 64,
    preprocess: PreprocessSpec = PREPROCESS,
) -> LoadedModel:
    """A model as `load_model` returns it."""
    return LoadedModel(
        name="test",
        version="0",
        module=module.eval().requires_grad_(False),
        preprocess=dataclasses.replace(preprocess, resize_px=px, crop_px=(px, px)),
        labels=(),
        class_count=class_count,
        layers=tuple(layers),
    )


def noise(count: int, px: int = 64, seed: int = 0) -> np.ndarray:
    """uint8 (count, px, px, 3), smooth enough that images differ in more than noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 8, 8, 3))
    return np.repeat(np.repeat(coarse, px // 8, 1), px // 8, 2).astype(np.uint8)


def hook_count(module: nn.Module) -> int:
    """How many hooks there are on a module and all below it."""
    return sum(len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def without_hooks(module: nn.Module) -> nn.Module:
    """A copy of a network, in the same mode, that no engine has its hooks on."""
    module = copy.deepcopy(module)
    for child in module.modules():
        child._forward_hooks.clear()
    return module


_exports: dict[str, tuple[Path, Manifest]] = {}


def bundle(model: LoadedModel) -> tuple[Path, Manifest]:
    """What the server exports for TorchScript; made once per run of the tests and model, as it takes seconds."""
    return _server_s(export_bundle, model, "fp32")


def network(model: LoadedModel, precision: str = "fp32") -> tuple[Path, Manifest]:
    """What the server exports for onnxruntime; made once per run of the tests."""
    return _server_s(export_network, model, precision)


def _server_s(write: Callable[..., Manifest], model: LoadedModel, precision: str) -> tuple[Path, Manifest]:
    def make(folder: Path) -> Manifest:
        # A copy, as the engine changes the layout of the weights, and with that what is recorded.
        reference = TorchEngine(dataclasses.replace(model, module=copy.deepcopy(model.module)), device="cpu")
        methods = reference.info.methods
        reference.close()
        return write(model, methods=methods, precision=precision, source="test", folder=folder, report=lambda _: None)

    return _once(make, model, write.__name__, precision)


def user_export(model: LoadedModel, file_format: Format, spec: GraphSpec) -> tuple[Path, Manifest]:
    """What people export by hand: one graph; made once per run of the tests."""

    def make(folder: Path) -> Manifest:
        return export_model(
            model,
            spec,
            file_format=file_format,
            source="test",
            folder=folder,
            verify=False,
            report=lambda _: None,
        )

    return _once(make, model, file_format, spec)


def _once(make: Callable[[Path], Manifest], model: LoadedModel, *rest: object) -> tuple[Path, Manifest]:
    """An export from where all processes of a run of the tests keep theirs (conftest.cache_home)."""
    described = {
        field.name: getattr(model, field.name) for field in dataclasses.fields(model) if field.name != "module"
    }
    named = repr((type(model.module), weights_version(model.module), described, rest))
    if named not in _exports:
        place = Path(os.environ["XDG_CACHE_HOME"], "test-exports")
        folder = place / hashlib.sha256(named.encode()).hexdigest()
        manifest_path = folder.with_suffix(".manifest")
        place.mkdir(exist_ok=True)
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not manifest_path.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of an export that failed
                folder.mkdir()
                # Not in the folder: servers' exports come without one until they are verified.
                manifest_path.write_bytes(pickle.dumps(make(folder)))
        _exports[named] = folder, pickle.loads(manifest_path.read_bytes())
    return _exports[named]


class Judge:
    """Logits and maps in float64, by a full backward pass through an untouched copy of the model, image by image."""

    def __init__(self, module: nn.Module, preprocess: PreprocessSpec = PREPROCESS) -> None:
        self._preprocess = preprocess
        self._module = copy.deepcopy(module).double().eval().requires_grad_(True)

    def logits(self, image: np.ndarray) -> np.ndarray:
        return self._module(self._input(image))[0].detach().numpy()

    def maps(
        self, image: np.ndarray, class_ids: Sequence[int], method: Method, layers: Sequence[str], *, upsample: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """(maps (K, h, w) in [0, 1], raw maps (K, h, w))."""
        raws = [self._raw(image, class_ids, method, layer) for layer in layers]
        finished = saliency(raws, image.shape[:2] if upsample else None)
        raw = finished.values * finished.scale[..., None, None] + finished.offset[..., None, None]
        return finished.values[0].numpy(), raw[0].numpy()

    def _raw(self, image: np.ndarray, class_ids: Sequence[int], method: Method, layer: str) -> torch.Tensor:
        raws = []
        for class_id in class_ids:
            kept: list[torch.Tensor] = []
            # A clone goes on, so that an in-place module downstream cannot change what is kept.
            hook = self._module.get_submodule(layer).register_forward_hook(
                lambda _m, _a, out, kept=kept: (kept.append(out), out.clone())[1]
            )
            score = self._module(self._input(image))[0, class_id]
            hook.remove()
            (gradient,) = torch.autograd.grad(score, kept)
            raws.append(raw_map(method, kept[0].detach(), gradient[:, None]))
        return torch.cat(raws, dim=1)

    def _input(self, image: np.ndarray) -> torch.Tensor:
        preprocess = self._preprocess
        values = (image.astype(np.float64) / 255.0 * preprocess.scale - np.array(preprocess.mean)) / np.array(
            preprocess.std
        )
        return torch.from_numpy(values).permute(2, 0, 1)[None]
