"""Methods and special class ids by name, without torch, so that configuration and validation can know them cheaply."""

from enum import StrEnum

RANKED = -1
"""In `wanted`, at position k: the class that is the k-th most probable, counted from 0."""

ABSENT = -2
"""In `wanted` and in class ids: nothing. Pads images that want fewer classes than others of their batch."""


class Method(StrEnum):
    """A way to make a saliency map. The value is its name in configuration files and SDKs."""

    CAM = "cam"
    GRAD_CAM = "grad-cam"
    GRAD_CAM_PLUS_PLUS = "grad-cam-plus-plus"
    HI_RES_CAM = "hi-res-cam"
    X_GRAD_CAM = "x-grad-cam"
    LAYER_CAM = "layer-cam"
    ELEMENT_WISE_GRAD_CAM = "element-wise-grad-cam"

    @property
    def needs_gradient(self) -> bool:
        """Whether the method differentiates the score. CAM only reads the linear head's weights."""
        return self is not Method.CAM
