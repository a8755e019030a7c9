"""The torch engine: the model as it is, hooks on its layers, a backward pass over the tail alone.

It is the reference that every other engine is compared with.
"""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from heatlens_server.cam.catalog import CLOSED_FORMS, Method
from heatlens_server.cam.methods import cam, raw_map
from heatlens_server.cam.normalize import NormalizedMap
from heatlens_server.cam.precision import FP16_GRADIENT_SCALE
from heatlens_server.cam.saliency import saliency
from heatlens_server.cam.targets import ABSENT, RANKED, resolve, score
from heatlens_server.engines.base import EngineInfo, ImageResult, MapSpec, Target, TopK, UInt8Array
from heatlens_server.engines.tape import Tape, TapeRecorder
from heatlens_server.engines.torch_device import resolve_device
from heatlens_server.errors import ModelLoadError
from heatlens_server.models.spec import LoadedModel

_log = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class TorchEngine:
    """Explains with PyTorch, on a CPU or a CUDA device. Implements `engines.base.Engine`.

    The module given is moved to the device and frozen; the engine owns it from then on.
    """

    def __init__(self, model: LoadedModel, *, device: str = "auto", precision: str = "fp32") -> None:
        """Prepare the model and check that it can be explained.

        Raises:
            ModelLoadError: no such device, or the score does not depend on a layer.
        """
        self._device = resolve_device(device)
        self._dtype = _DTYPES[precision]
        self._gradient_scale = FP16_GRADIENT_SCALE if self._dtype is torch.float16 else 1.0
        self._module = model.module.eval().requires_grad_(requires_grad=False)
        self._layout = torch.channels_last
        spec = model.preprocess
        std = torch.tensor(spec.std, dtype=torch.float64)
        mean = torch.tensor(spec.mean, dtype=torch.float64)
        self._scale = self._channel_vector(1.0 / (255.0 * std))
        self._bias = self._channel_vector(-mean / std)
        self._recorder = TapeRecorder(self._module, model.layers)
        try:
            height_px, width_px = spec.crop_px
            self._head_weight = self._place(model, height_px=height_px, width_px=width_px)
        except BaseException:
            self._recorder.remove()
            raise
        self._info = EngineInfo(
            kind="torch",
            device=str(self._device),
            precision=precision,
            input_height_px=height_px,
            input_width_px=width_px,
            class_count=model.class_count,
            methods=tuple(m for m in CLOSED_FORMS if m is not Method.CAM or self._head_weight is not None),
            layers=model.layers,
        )

    @property
    def info(self) -> EngineInfo:
        """What this engine can do."""
        return self._info

    def explain(self, images: UInt8Array, targets: Sequence[Target], spec: MapSpec) -> list[ImageResult]:
        """Explain a batch; see `engines.base.Engine.explain`.

        The forward pass runs once, whatever the number of classes; each class costs one backward pass over the tail.

        Raises:
            MemoryError: the device is out of memory.
        """
        try:
            # Callers may be in no_grad or inference_mode: neither is any business of ours.
            with torch.inference_mode(mode=False), torch.enable_grad():
                return self._explain(images, targets, spec)
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise MemoryError(str(error)) from None
        except RuntimeError as error:
            if "DefaultCPUAllocator" in str(error):
                raise MemoryError(str(error)) from None
            raise

    def close(self) -> None:
        """Take every hook off the model and let go of it. Idempotent."""
        self._recorder.remove()

    def _explain(self, images: UInt8Array, targets: Sequence[Target], spec: MapSpec) -> list[ImageResult]:
        inputs = self._normalise(images)
        with self._recorder.recording(spec.layers, differentiate=spec.method.needs_gradient) as tape:
            logits = _logits_of(self._module(inputs))
        class_ids = resolve(logits.detach(), _wanted(targets, logits.device))
        activations = [tape.activations[layer] for layer in spec.layers]
        with torch.no_grad():
            if spec.method is Method.CAM:
                raw = [self._class_activation_maps(activations[0], class_ids)]
            else:
                raw = self._gradient_maps(spec.method, logits, class_ids, activations)
            maps = saliency(raw, (images.shape[1], images.shape[2]) if spec.upsample else None)
        return _split(logits.detach(), class_ids, maps, targets)

    def _class_activation_maps(self, activations: Tensor, class_ids: Tensor) -> Tensor:
        if self._head_weight is None:
            raise ValueError("this model has no linear head over pooled activations")
        # An absent class (ABSENT) indexes row 0: its map is computed and dropped.
        return cam(activations, self._head_weight[class_ids.clamp(min=0)])

    def _gradient_maps(
        self, method: Method, logits: Tensor, class_ids: Tensor, activations: Sequence[Tensor]
    ) -> list[Tensor]:
        """Raw maps (N, K, h, w), one per layer. Class by class, so that one class's gradients are held at a time."""
        class_count = class_ids.shape[1]
        detached = [activation.detach() for activation in activations]
        maps: list[list[Tensor]] = [[] for _ in activations]
        for k in range(class_count):
            with torch.enable_grad():
                scaled = score(logits, class_ids, k) * self._gradient_scale
            gradients = torch.autograd.grad(scaled, activations, retain_graph=k + 1 < class_count)
            for of_layer, activation, gradient in zip(maps, detached, gradients, strict=True):
                of_layer.append(raw_map(method, activation, self._unscale(gradient)[:, None]))
        return [torch.cat(of_layer, dim=1) for of_layer in maps]

    def _unscale(self, gradient: Tensor) -> Tensor:
        return gradient if self._gradient_scale == 1.0 else gradient.float() / self._gradient_scale

    def _normalise(self, images: UInt8Array) -> Tensor:
        """uint8 (N, H, W, 3) to normalised (N, 3, H, W) on the device; channels_last takes no copy."""
        pixels = torch.from_numpy(images).to(self._device, non_blocking=True).permute(0, 3, 1, 2)
        normalised = torch.addcmul(self._bias, pixels.to(torch.float32), self._scale).to(self._dtype)
        return normalised.contiguous(memory_format=self._layout)

    def _channel_vector(self, values: Tensor) -> Tensor:
        return values.to(device=self._device, dtype=torch.float32).view(1, 3, 1, 1)

    def _place(self, model: LoadedModel, *, height_px: int, width_px: int) -> Tensor | None:
        """Move the model to its device, in the layout that it runs in, and check it; return what `_check` does.

        channels_last is what the uint8 images arrive in, and what convolutions are fastest in: on CUDA with half
        precision, and on CPUs too (1.2x to 3x here for depthwise networks). A network that takes `x.view(len(x), -1)`
        of a feature map cannot run in it.
        """
        self._module.to(self._device, self._dtype).to(memory_format=self._layout)
        try:
            return self._check(model, height_px=height_px, width_px=width_px)
        except RuntimeError as error:
            if "view size is not compatible" not in str(error):
                raise
        _log.info("model %s runs in torch's default layout: it takes views of feature maps", model.name)
        self._layout = torch.contiguous_format
        self._module.to(memory_format=self._layout)
        return self._check(model, height_px=height_px, width_px=width_px)

    def _check(self, model: LoadedModel, *, height_px: int, width_px: int) -> Tensor | None:
        """Run the model once on noise, so that what cannot be explained fails at load.

        Returns:
            The linear head's weight (C, A) if the logits are that head over the pooled default layer, else None.
        """
        noise = np.random.default_rng(0).integers(0, 256, (1, height_px, width_px, 3), dtype=np.uint8)
        with torch.inference_mode(mode=False), torch.enable_grad():
            inputs = self._normalise(noise)
            with self._recorder.recording(model.layers, differentiate=True) as tape:
                logits = _logits_of(self._module(inputs))
            if logits.ndim != 2 or logits.shape[1] != model.class_count:
                raise ModelLoadError(
                    f"the model gives an output of shape {tuple(logits.shape)}, not (1, {model.class_count})"
                )
            self._check_layers(tape, logits, model.layers)
            return self._find_head(tape.activations[model.layers[0]].detach(), logits.detach())

    def _check_layers(self, tape: Tape, logits: Tensor, layers: Sequence[str]) -> None:
        for layer in layers:
            activation = tape.activations.get(layer)
            if activation is None:
                raise ModelLoadError(f"layer {layer!r} did not run")
            if activation.ndim != 4:
                raise ModelLoadError(
                    f"layer {layer!r} gives a tensor of {activation.ndim} dimensions, not (N, C, h, w)"
                )
        gradients = (
            torch.autograd.grad(logits.sum(), [tape.activations[name] for name in layers], allow_unused=True)
            if logits.requires_grad
            else [None] * len(layers)
        )
        for layer, gradient in zip(layers, gradients, strict=True):
            if gradient is None:
                raise ModelLoadError(f"the model's output does not depend on layer {layer!r} by a gradient")

    def _find_head(self, activation: Tensor, logits: Tensor) -> Tensor | None:
        """The last linear layer, if it alone stands between the pooled activation and the logits."""
        linears = [
            module
            for module in self._module.modules()
            if isinstance(module, nn.Linear) and module.weight.shape == (logits.shape[1], activation.shape[1])
        ]
        if not linears:
            return None
        head = linears[-1]
        predicted = head(activation.mean((-2, -1)))
        tolerance = 1e-4 if self._dtype is torch.float32 else 2e-2
        spread = float(logits.float().abs().amax())
        matches = float((predicted.float() - logits.float()).abs().amax()) <= tolerance * max(spread, 1e-12)
        return head.weight.detach() if matches else None


def _logits_of(output: object) -> Tensor:
    """The logits in a model's output: the tensor itself, or its `logits`."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise ModelLoadError(f"the model gives a {type(output).__name__}, not a tensor of logits")


def _wanted(targets: Sequence[Target], device: torch.device) -> Tensor:
    """The targets as int64 (N, K) for `cam.targets.resolve`, short rows padded with ABSENT."""
    rows = [[RANKED] * t.k if isinstance(t, TopK) else list(t.ids) for t in targets]
    width = max(len(row) for row in rows)
    return torch.tensor([row + [ABSENT] * (width - len(row)) for row in rows], dtype=torch.int64, device=device)


def _split(logits: Tensor, class_ids: Tensor, maps: NormalizedMap, targets: Sequence[Target]) -> list[ImageResult]:
    scores, values, scales, offsets = (t.float().cpu().numpy() for t in (logits, maps.values, maps.scale, maps.offset))
    ids = class_ids.tolist()
    results = []
    for n, target in enumerate(targets):
        count = target.k if isinstance(target, TopK) else len(target.ids)
        results.append(
            ImageResult(
                logits=scores[n],
                class_ids=tuple(ids[n][:count]),
                maps=values[n, :count],
                scales=scales[n, :count],
                offsets=offsets[n, :count],
            )
        )
    return results
