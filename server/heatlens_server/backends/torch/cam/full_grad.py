"""FullGrad's maps: how contributions to a score that lie on an image become one map at its size."""

from torch import Tensor

from heatlens_server.backends.torch.cam.normalize import normalize
from heatlens_server.backends.torch.cam.resize import upsample


def spread(contributions: Tensor, size_px: tuple[int, int]) -> Tensor:
    """Sum, over channels, the size of contributions, each channel stretched to [0, 1] and resized to the image.

    Srinivas and Fleuret 2019 (FullGrad), https://arxiv.org/abs/1905.00780, section 4: psi, and the inner sum of
    equation 5, with the absolute value. Channels are stretched one by one, as the equation has it and as in the
    `grad-cam` package 1.5.7; the authors' program stretches those of a layer together. A flat channel adds nothing.

    Args:
        contributions: (N, C, h, w): input times gradient, or the bias-gradients of a layer.
        size_px: (height, width) of the image.

    Returns:
        (N, 1, height, width), float32 or wider, in [0, C].
    """
    # Resizing is linear: the sum is resized in the place of every channel.
    return upsample(normalize(contributions.abs()).values.sum(dim=1, keepdim=True), size_px)
