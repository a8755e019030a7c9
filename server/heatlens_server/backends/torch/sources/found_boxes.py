"""What a detector with torchvision's interface takes and returns, and the layer that all its boxes depend on."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from heatlens_server.backends.torch.sources.feature_maps import Candidate
from heatlens_server.core.errors import ModelLoadError

Found = Mapping[str, Tensor]
"""What a detector says about one image: "boxes" (M, 4) in pixels of its input, "labels" (M,) and "scores" (M,)."""

_WAY_OUT = (
    'a detector takes a list of images (C, H, W) in [0, 1] and returns for each a mapping of "boxes" (M, 4), "labels" '
    '(M,) and "scores" (M,), as torchvision\'s do; docs/tasks.md has a wrapper for others'
)
_PATCH_PX = 8


def check_found(output: object) -> Sequence[Found]:
    """What a network returned, if it is what a detector returns.

    Raises:
        ModelLoadError: it is not; says what to write.
    """
    if not isinstance(output, list | tuple) or not all(_is_found(found) for found in output):
        raise ModelLoadError(f"the network returns {_described(output)}: {_WAY_OUT}")
    return output


def _is_found(found: Any) -> bool:  # noqa: ANN401 - what a network returns
    if not isinstance(found, Mapping):
        return False
    boxes, labels, scores = (found.get(name) for name in ("boxes", "labels", "scores"))
    if not (isinstance(boxes, Tensor) and isinstance(labels, Tensor) and isinstance(scores, Tensor)):
        return False
    count = len(scores) if scores.ndim == 1 else -1
    return (
        boxes.shape == (count, 4)
        and labels.shape == (count,)
        and boxes.is_floating_point()
        and scores.is_floating_point()
        and not labels.is_floating_point()
    )


def _described(output: object) -> str:
    """What a network returned, in words."""
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    if not isinstance(output, list | tuple) or not output:
        return type(output).__name__
    first = output[0]
    if not isinstance(first, Mapping):
        return f"a {type(output).__name__} of {type(first).__name__}"
    parts = [
        f"{name}: {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else f"{name}: {type(value).__name__}"
        for name, value in first.items()
    ]
    return f"a {type(output).__name__} of mappings ({', '.join(parts)})"


def detect(module: nn.Module, image: Tensor) -> Found:
    """What a detector finds in one image (C, H, W), without gradients.

    Raises:
        ModelLoadError: it fails, or is no detector of this interface; says what to write.
    """
    try:
        with torch.no_grad():
            output: object = module([image])
    # A network is foreign code and may raise anything.
    except Exception as error:
        raise ModelLoadError(
            f"the network fails on a list of one image {tuple(image.shape)} ({type(error).__name__}): {_WAY_OUT}"
        ) from error
    found = check_found(output)
    if len(found) != 1:
        raise ModelLoadError(f"the network returns {len(found)} results for one image: {_WAY_OUT}")
    return found[0]


class BoxSearch:
    """A detector, and images in which it finds something."""

    def __init__(self, module: nn.Module, shape: tuple[int, int, int]) -> None:
        """Try a photo and noise.

        Args:
            module: in eval mode. Left as it was.
            shape: (C, H, W) of its input.

        Raises:
            ModelLoadError: the network is no detector, or finds nothing in any of them.
        """
        self._module = module
        tried = _trial_images(shape)
        self._images = [image for image in tried if _sure(detect(module, image))]
        self._fixed = _same_for_all(module, [torch.zeros(shape), *tried])
        if not self._images:
            raise ModelLoadError(
                "the layer to explain is found by what boxes depend on, and the detector finds none in a photo and in "
                "noise: name it in `layers`"
            )

    def is_common(self, candidate: Candidate) -> bool:
        """Whether every box depends on a layer's output, and a later layer with parameters reads it.

        The network runs with NaN in all of that output: no box with a score may be left. NaN passes weights that are
        zero, as those of a new head often are. What no layer reads are the scores or boxes themselves. What is the same
        for all images, as an embedding of places is, explains none.
        """
        layer = candidate.trace.module
        return layer not in self._fixed and all(self._without(layer, image) for image in self._images)

    def _without(self, layer: nn.Module, image: Tensor) -> bool:
        is_read = False

        def replace(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            return torch.full_like(output, torch.nan)

        def watch(_child: nn.Module, inputs: tuple[object, ...]) -> None:
            nonlocal is_read
            is_read |= any(isinstance(one, Tensor) and bool(one.isnan().any()) for one in inputs)

        layers = [child for child in self._module.modules() if next(child.parameters(recurse=False), None) is not None]
        handles = [child.register_forward_pre_hook(watch) for child in layers]
        handles.append(layer.register_forward_hook(replace))
        try:
            return not _sure(detect(self._module, image)) and is_read
        except ModelLoadError:
            # Code that cannot take NaN tells nothing.
            return False
        finally:
            for handle in handles:
                handle.remove()


def _same_for_all(module: nn.Module, images: Sequence[Tensor]) -> set[nn.Module]:
    """The modules that return the same tensor for all images."""
    sums: dict[nn.Module, set[float]] = {}

    def hook(child: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor):
            sums.setdefault(child, set()).add(float(output.double().sum()))

    handles = [child.register_forward_hook(hook) for child in module.modules()]
    try:
        for image in images:
            detect(module, image)
    finally:
        for handle in handles:
            handle.remove()
    return {child for child, values in sums.items() if len(values) == 1}


def _sure(found: Found) -> bool:
    """Whether there is a box that has a score."""
    return bool(found["scores"].isfinite().any())


def _trial_images(shape: tuple[int, int, int]) -> list[Tensor]:
    """A photo, unless channels are no colours, and noise in patches, since photos have contrast between regions."""
    channels, height_px, width_px = shape
    patches = torch.rand(
        (1, channels, -(-height_px // _PATCH_PX), -(-width_px // _PATCH_PX)), generator=torch.Generator().manual_seed(0)
    )
    noise = patches.repeat_interleave(_PATCH_PX, 2).repeat_interleave(_PATCH_PX, 3)[0, :, :height_px, :width_px]
    if channels not in {1, 3}:
        return [noise]
    file = files("heatlens_server.backends.torch.export") / "photos" / "chelsea.jpg"
    kind = cv2.IMREAD_COLOR_RGB if channels == 3 else cv2.IMREAD_GRAYSCALE
    photo = np.asarray(cv2.imdecode(np.frombuffer(file.read_bytes(), np.uint8), kind))
    resized = cv2.resize(photo, (width_px, height_px), interpolation=cv2.INTER_AREA)
    pixels = torch.from_numpy(np.asarray(resized)).reshape(height_px, width_px, channels)
    return [pixels.permute(2, 0, 1).contiguous() / 255, noise]
