"""A network on its device, as everything that explains with torch uses it: run it, record layers, change them."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from heatlens_server.backends.torch.cam.grid import LayerOutput, to_map
from heatlens_server.backends.torch.cam.saliency import cut
from heatlens_server.backends.torch.goals.base import TaskModel
from heatlens_server.backends.torch.network.attention_blocks import AttentionRecorder, find_attention
from heatlens_server.backends.torch.network.device import recording_allowed, resolve_device
from heatlens_server.backends.torch.network.hooks import Change, LayerHooks, Recording, copied
from heatlens_server.backends.torch.network.replay import first_row, laid_out_like, same, two_rows
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.backends.torch.sources.trace import is_quantised
from heatlens_server.core.arrays import ImageArray
from heatlens_server.core.engine import LayerShape
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.methods import Method
from heatlens_server.maps.precision import FP16_GRADIENT_SCALE

_log = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_PRECISIONS = {dtype: precision for precision, dtype in _DTYPES.items()}
_SHUFFLE_SEED = 0
_REDUCTIONS = (1.0, 2.0**-8, 2.0**-16)


class TorchModel:
    """A frozen network in the layout and precision that it runs in. Its methods are for one thread at a time.

    Attributes:
        model: what was loaded.
        task: what it does.
        module: the network; owned from construction on.
        device: where it is.
        dtype: what it runs in.
        head_weight: (C, A), if the logits are a linear head over the pooled first layer; None until `check` finds it.
        attention: the blocks of a transformer; None until `check` finds them.
        layer_shapes: of the layers' maps for an image of the usual size; found by `check`.
        mixes_batch: whether images change each other's scores when they are run together; found by `check`.
        without_gradient: the layers behind which the network computes no gradient, and why; found by `check`.
        gradient_scale: what scores are multiplied by before they are differentiated; see `gradients`.
    """

    def __init__(self, model: LoadedModel, task: TaskModel, *, device: str, precision: str) -> None:
        """Move the network to its device.

        Raises:
            ModelLoadError: there is no such device.
        """
        self.model = model
        self.task = task
        self.device = resolve_device(device)
        self.dtype = _DTYPES[precision]
        self.gradient_scale = FP16_GRADIENT_SCALE if self.dtype is torch.float16 else 1.0
        self.module: nn.Module = model.module.eval().requires_grad_(requires_grad=False)
        # channels_last is what images arrive in, and what convolutions are fastest in: on CUDA with half
        # precision, and on CPUs too (1.2x to 3x here for depthwise networks).
        self._layout = torch.channels_last
        self.module.to(self.device, self.dtype).to(memory_format=self._layout)
        if self.device.type == "cuda":
            _keep_for_backward(self.module)
        self._gains = self._channel_vector(model.preprocess.gains)
        self._biases = self._channel_vector(model.preprocess.biases)
        self._hooks = LayerHooks(self.module, model.layers)
        self._one_row: dict[str, bool] = {}
        self.head_weight: Tensor | None = None
        self.layer_shapes: dict[str, LayerShape] = {}
        self.attention: AttentionRecorder | None = None
        self.mixes_batch = False
        self.without_gradient: Mapping[str, str] = {}
        self._twin: TorchModel | None = None

    def check(self) -> None:
        """Run the network once on noise, so that a model that cannot be explained fails at load.

        Raises:
            ModelLoadError: the output is not of the task, or a layer cannot be explained.
        """
        try:
            self._check()
        except RuntimeError as error:
            if "view size is not compatible" not in str(error):
                raise
            # The network takes `x.view(len(x), -1)` of a feature map.
            _log.info("model %s runs in torch's default layout: it takes views of feature maps", self.model.name)
            self._layout = torch.contiguous_format
            self.module.to(memory_format=self._layout)
            self._check()

    def inputs(self, images: ImageArray) -> Tensor:
        """Images (N, H, W, C) to normalised (N, C, H, W) on the device; channels_last takes no copy."""
        pixels = torch.from_numpy(images).to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        normalised = torch.addcmul(self._biases, pixels.to(torch.float32), self._gains).to(self.dtype)
        return normalised.contiguous(memory_format=self._layout)

    def run(self, inputs: Tensor) -> Any:  # noqa: ANN401 - what a network returns
        """Run the network on (R, C, H, W) in any floating dtype; return the task's output."""
        padded = self.padded(inputs)
        output = self.task.run(self.module, padded.to(self.dtype).contiguous(memory_format=self._layout))
        return output if padded is inputs else self.task.unpadded(output, (inputs.shape[2], inputs.shape[3]))

    def padded(self, inputs: Tensor) -> Tensor:
        """Inputs (R, C, H, W) with their last row and column repeated, up to sizes that the network takes."""
        preprocess, (height_px, width_px) = self.model.preprocess, inputs.shape[2:]
        rows, columns = (
            torch.arange(preprocess.padded_px(side_px), device=inputs.device).clamp(max=side_px - 1)
            for side_px in (height_px, width_px)
        )
        if (len(rows), len(columns)) == (height_px, width_px):
            return inputs
        return inputs.index_select(2, rows).index_select(3, columns)

    def run_images(self, images: ImageArray) -> Any:  # noqa: ANN401 - what a network returns
        """Run the network on images (N, H, W, C), without gradients."""
        with torch.no_grad():
            return self.run(self.inputs(images))

    def record(
        self, inputs: Tensor, layers: Sequence[str], *, differentiate: bool
    ) -> tuple[Any, dict[str, LayerOutput]]:
        """Run the network and keep what layers return.

        Args:
            inputs: (N, C, H, W).
            layers: of the model's.
            differentiate: whether the outputs are to be leaves that the scores can be differentiated by.

        Returns:
            The task's output, and the layers' outputs by name.
        """
        with self._hooks.active(Recording(layers, differentiate=differentiate)) as recording:
            output = self.run(inputs)
        return output, recording.outputs

    def features(self, layer: str, output: LayerOutput) -> Tensor:
        """A layer's output as a map (N, C, h, w)."""
        return to_map(output, self.model.grid(layer))

    def on_image(self, maps: Tensor, size_px: tuple[int, int]) -> Tensor:
        """The part of a layer's maps (N, C, h, w) that lies on images of a size: all, unless they are padded."""
        preprocess, (height_px, width_px) = self.model.preprocess, size_px
        padded_px = (preprocess.padded_px(height_px), preprocess.padded_px(width_px))
        part = self.task.part_on_image(self.module, (preprocess.channels, *padded_px))
        if padded_px != size_px:
            part = part.corner(height_px / padded_px[0], width_px / padded_px[1])
        return cut(maps, part)

    def gradients(self, score: Tensor, leaves: Sequence[Tensor], *, retain_graph: bool = False) -> list[Tensor]:
        """Differentiate a scalar. In float16 it is scaled on the way, so that small gradients do not vanish.

        The gradient of a sum over many places may leave float16 instead: then it is scaled down, and tried again.

        Returns:
            The gradients, in the leaves' shapes; float32 if scaled.
        """
        if self.gradient_scale == 1.0:
            return list(torch.autograd.grad(score, leaves, retain_graph=retain_graph))
        again = self.model.task.traits.gradients_can_overflow
        found: list[Tensor] = []
        for reduced in _REDUCTIONS if again else _REDUCTIONS[:1]:
            scale = self.gradient_scale * reduced
            with torch.enable_grad():
                scaled = score * scale
            gradients = torch.autograd.grad(scaled, leaves, retain_graph=retain_graph or again)
            found = [gradient.float() / scale for gradient in gradients]
            if not again or all(bool(gradient.isfinite().all()) for gradient in found):
                break
        return found

    def replay(self, inputs: Tensor, layer: str, change: Change, rows: int) -> Any:  # noqa: ANN401
        """Run the network on one image with a layer's output changed in `rows` ways, without gradients.

        The part before the layer runs on one row, where the network allows it: what bypasses the layer is then
        broadcast. Whether it does is tried once per layer.

        Args:
            inputs: (1, C, H, W).
            layer: of the model's.
            change: from the layer's output for the image to one of `rows` rows.
            rows: how many.

        Returns:
            The task's output of `rows` rows.
        """
        if rows > 1 and layer not in self._one_row:
            self._one_row[layer] = self._can_run_on_one_row(inputs, layer)
        if rows == 1 or self._one_row[layer]:
            output = self._changed(inputs, layer, change)
            if self.task.rows(output) == rows:
                return output
            self._one_row[layer] = False
        return self._changed_in_full(inputs, layer, change, rows)

    def twin(self) -> "TorchModel":
        """The same network with weights that mean nothing: those of each parameter in another order, always the same.

        For the sanity check of Adebayo et al. 2018, arXiv:1810.03292. Made when it is first asked for, and kept.
        """
        if self._twin is None:
            module = copied(self.module)
            generator = torch.Generator().manual_seed(_SHUFFLE_SEED)
            with torch.no_grad():
                for parameter in module.parameters():
                    order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
                    parameter.copy_(parameter.flatten()[order].view_as(parameter))
            twin = TorchModel(
                dataclasses.replace(self.model, module=module),
                self.task,
                device=str(self.device),
                precision=_PRECISIONS[self.dtype],
            )
            twin.check()
            self._twin = twin
        return self._twin

    def close(self) -> None:
        """Take every hook off the network. Idempotent."""
        self._hooks.remove()
        if self.attention is not None:
            self.attention.remove()
        if self._twin is not None:
            self._twin.close()

    def _changed(self, inputs: Tensor, layer: str, change: Change) -> Any:  # noqa: ANN401 - what a network returns
        def changed(output: LayerOutput) -> LayerOutput:
            return laid_out_like(change(output), output)

        with torch.no_grad(), self._hooks.active(Recording(changes={layer: changed})):
            return self.run(inputs)

    def _changed_in_full(self, inputs: Tensor, layer: str, change: Change, rows: int) -> Any:  # noqa: ANN401
        return self._changed(inputs.expand(rows, -1, -1, -1), layer, lambda output: change(first_row(output)))

    def _can_run_on_one_row(self, inputs: Tensor, layer: str) -> bool:
        try:
            found = self._changed(inputs, layer, two_rows)
            # The right rows from the wrong images would be the same for one image: these two differ.
            right = same(found, self._changed_in_full(inputs, layer, two_rows, 2), self.dtype)
        except torch.OutOfMemoryError:
            raise
        # In foreign code, shapes that do not fit may raise anything.
        except Exception:
            right = False
        if not right:
            _log.info("model %s: the part before %s runs once per row", self.model.name, layer)
        return right

    def _check(self) -> None:
        layers = self.model.layers
        preprocess = self.model.preprocess
        with recording_allowed():
            inputs = self.inputs(_noise(*preprocess.sample_px, preprocess.channels))
            output, outputs = self.record(inputs, layers, differentiate=True)
            total = self.task.total(output, self.model.class_count)
            self.layer_shapes = {layer: self._checked_shape(layer, outputs) for layer in layers}
            leaves = {layer: leaf for layer, leaf in outputs.items() if isinstance(leaf, Tensor)}
            gradients: Sequence[Tensor | None] = [None] * len(leaves)
            if total.requires_grad:
                gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
            missing = [layer for layer, gradient in zip(leaves, gradients, strict=True) if gradient is None]
            for layer in missing:
                if not self._depends(layer, inputs, output):
                    raise ModelLoadError(f"layers: the model's output does not depend on layer {layer!r}")
            self.without_gradient = {layer: self._why_no_gradient(layer, output) for layer in missing}
            if Method.CAM not in self.model.task.traits.unsupported_methods:
                self.head_weight = self._find_head(
                    self.features(layers[0], outputs[layers[0]]).detach(), output.detach()
                )
            two = torch.cat([inputs, inputs.flip(-1)])
            if isinstance(output, Tensor):
                self.mixes_batch = self._mixes(two, output)
            self.mixes_batch = self.mixes_batch or self._runs_layers_apart(two, outputs)
            self.attention = find_attention(self.module, self.run, two, self.model.grid(layers[0]))

    def _mixes(self, two: Tensor, first: Tensor) -> bool:
        """Whether the scores of two images are others when they are run together.

        Args:
            two: (2, C, H, W).
            first: the output for the first of them alone.

        Raises:
            ModelLoadError: the scores of one image are others when it is run again.
        """
        with torch.no_grad():
            if not same(self.run(two[:1]), first, self.dtype):
                raise ModelLoadError(
                    "the network gives other scores when it is run again on the same image: it draws at random, as "
                    "F.dropout does without training=self.training"
                )
            try:
                together = self.run(two)
            except torch.OutOfMemoryError:
                raise
            # A network that is written for one image may raise anything.
            except Exception:
                return True
            return not same(together, torch.cat([first.detach(), self.run(two[1:])]), self.dtype)

    def _runs_layers_apart(self, two: Tensor, first: Mapping[str, LayerOutput]) -> bool:
        """Whether a layer runs once per image, so that of two images only the last one's output is seen.

        Args:
            two: (2, C, H, W).
            first: the layers' outputs for the first of them alone.
        """
        try:
            _, outputs = self.record(two, self.model.layers, differentiate=False)
            return any(
                len(self.features(layer, outputs[layer])) != 2 * len(self.features(layer, first[layer]))
                for layer in self.model.layers
            )
        except torch.OutOfMemoryError:
            raise
        # A network that is written for one image may raise anything.
        except Exception:
            return True

    def _checked_shape(self, layer: str, outputs: Mapping[str, LayerOutput]) -> LayerShape:
        if layer not in outputs:
            raise ModelLoadError(f"layer {layer!r} did not run")
        try:
            _, channels, height, width = self.features(layer, outputs[layer]).shape
        except ValueError as error:
            raise ModelLoadError(f"layer {layer!r}: {error}") from error
        return channels, height, width

    def _depends(self, layer: str, inputs: Tensor, output: Any) -> bool:  # noqa: ANN401 - what a network returns
        """Whether the output is another if a layer's is."""
        changed = self._changed(inputs, layer, lambda own: 1 - own if isinstance(own, Tensor) else own)
        return not same(changed, output, self.dtype)

    def _why_no_gradient(self, layer: str, output: Any) -> str:  # noqa: ANN401 - what a network returns
        if isinstance(output, Tensor) and output.is_inference():
            why = "it runs under torch.inference_mode"
        elif is_quantised(self.module):
            why = "layers are quantised"
        else:
            why = "it runs under torch.no_grad, detaches what it computes, or computes it outside PyTorch"
        return f"the network computes no gradient behind layer {layer!r}: {why}"

    def _find_head(self, features: Tensor, logits: Tensor) -> Tensor | None:
        """The last linear layer's weight, if it alone stands between the pooled features and the logits."""
        sides = self.model.reading.sides
        linears = [
            (module, weight)
            for module in self.module.modules()
            if isinstance(module, nn.Linear)
            and (weight := sides(module.weight.detach().T).T).shape == (logits.shape[1], features.shape[1])
        ]
        if not linears:
            return None
        head, weight = linears[-1]
        predicted = sides(head(features.mean((-2, -1))))
        tolerance = 1e-4 if self.dtype is torch.float32 else 2e-2
        spread = float(logits.float().abs().amax())
        matches = float((predicted.float() - logits.float()).abs().amax()) <= tolerance * max(spread, 1e-12)
        return weight if matches else None

    def _channel_vector(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self.device).view(1, -1, 1, 1)


def _keep_for_backward(module: nn.Module) -> None:
    """Let recurrent layers be differentiated on a GPU: cuDNN keeps what that takes in training mode only.

    Without dropout they compute the same in both modes. Turning cuDNN off instead would concern all threads.
    """
    for child in module.modules():
        if isinstance(child, nn.RNNBase):
            child.dropout = 0.0
            child.train()


def _noise(height_px: int, width_px: int, channels: int) -> ImageArray:
    """One image of noise, uint8 (1, H, W, C), to try a network with."""
    return np.random.default_rng(0).integers(0, 256, (1, height_px, width_px, channels), dtype=np.uint8)
