"""FullGrad: what the input and every bias of the network contribute to a score, on one map at the input's size."""

from collections.abc import Sequence

import torch
from torch import Tensor

from heatlens_server.backends.torch.cam.grid import Grid, Layout, to_map
from heatlens_server.backends.torch.network.hooks import Substitution
from heatlens_server.backends.torch.network.network import TorchModel
from heatlens_server.backends.torch.passes.bias_gradients import bias_gradients
from heatlens_server.backends.torch.passes.one_pass import PassSteps, RawMaps, input_gradient
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.targets import Target
from heatlens_server.maps.concrete import upsample
from heatlens_server.maps.normalization import normalize
from heatlens_server.maps.precision import at_least_float32


def full_grad(model: TorchModel, inputs: Tensor, targets: Sequence[Target], spec: MapSpec) -> PassSteps:
    """Explain with FullGrad; see `passes.one_pass.OnePass`. It looks at the whole network, not at layers.

    Srinivas and Fleuret 2019, https://arxiv.org/abs/1905.00780, equation 5: `psi(x * g)` plus the sum over layers and
    channels of `psi(bias-gradient)`; see `spread` for psi and `bias_gradients` for what a bias is. As in
    the paper, biases of layers without places (the linear head) have no map. Made for convolutional networks;
    of transformers the biases of layers whose tokens lie on the grid count.

    The raw map is (N, K, H, W).
    """
    leaf = inputs.detach().requires_grad_()
    found = _Found(model.padded(inputs), model.model.grid(model.model.layers[0]))
    with Substitution(bias_gradients(found.take)):
        # A copy: the network may change its input in place.
        output = model.run(leaf.clone())
    goals = model.task.goals(output, targets, score=spec.score, run=model.run_images)
    size_px = (inputs.shape[2], inputs.shape[3])
    maps = []
    yield
    for k in range(goals.width):
        more = k + 1 < goals.width
        gradient = input_gradient(model, goals.score(k), leaf, retain_graph=more, start=found.start)
        with torch.no_grad():
            of_pixels = spread(at_least_float32(leaf) * gradient, size_px)
            maps.append(model.on_image(found.map, size_px) + of_pixels)
        yield
    return RawMaps(goals, [torch.cat(maps, dim=1)])


class _Found:
    """The sum of the bias-gradients' maps in one backward pass.

    Attributes:
        size_px: (height, width) of the input.
        map: (N, 1, height, width).
    """

    def __init__(self, inputs: Tensor, grid: Grid) -> None:
        """Start with nothing.

        Args:
            inputs: (N, C, H, W), as the network gets them.
            grid: how the network's tokens lie on the image, if it has any.
        """
        n, _, height, width = inputs.shape
        self.size_px = (height, width)
        self.map = torch.zeros((n, 1, height, width), device=inputs.device)
        self._grid = grid

    def start(self) -> None:
        """Forget what was found."""
        self.map = torch.zeros_like(self.map)

    def take(self, bias_gradient: Tensor, channel_dim: int) -> None:
        """Add a bias-gradient, if it lies on the image."""
        with torch.no_grad():
            placed = self._place(bias_gradient, channel_dim)
            if placed is not None:
                self.map = self.map + spread(placed, self.size_px)

    def _place(self, values: Tensor, channel_dim: int) -> Tensor | None:
        """Values (N, ...) as a map (N, C, h, w); None if they lie on none, or on windows."""
        if len(values) != len(self.map):
            return None
        grid = self._grid
        if values.ndim == 4:
            values = values if channel_dim == 1 else values.permute(0, 3, 1, 2)
            (height, width), (rows, columns) = self.size_px, values.shape[-2:]
            # Places of the image, and not windows and their tokens, if height and width are reduced alike.
            return values if abs(rows * width - columns * height) < max(height, width) else None
        if grid.layout is Layout.TOKENS and values.ndim == 3 and channel_dim == -1:
            on_grid = values.shape[1] == grid.prefix + grid.height * grid.width
            return to_map(values, grid) if on_grid else None
        return None


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
    resized: Tensor = upsample(normalize(contributions.abs()).values.sum(dim=1, keepdim=True), size_px)
    return resized
