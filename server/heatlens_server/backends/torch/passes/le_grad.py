"""LeGrad: how sensitive each block's own score is to whom its tokens attend."""

from collections.abc import Sequence

import torch
from torch import Tensor

from heatlens_server.backends.torch.cam.grid import to_map
from heatlens_server.backends.torch.network.network import TorchModel
from heatlens_server.backends.torch.passes.one_pass import PassSteps, RawMaps
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.targets import Target
from heatlens_server.maps.precision import at_least_float32


def le_grad(model: TorchModel, inputs: Tensor, targets: Sequence[Target], spec: MapSpec) -> PassSteps:
    """Explain with LeGrad; see `passes.one_pass.OnePass`. It looks at all blocks, not at layers.

    Bousselham et al. 2024, https://arxiv.org/abs/2404.03214: `relu(d s[l] / d A[l])`, A[l] the attention matrices of
    block l, averaged over heads, queries and blocks; the keys that are places of the image are the map. The score s[l]
    is the block's own: what the last norm and the head make of the mean of all its tokens, as in the authors' program
    and in `torchcam` 0.5.0, also where the network itself reads its class token. Which class is the k-th most probable
    is decided by the network's own output. All blocks count; the authors' program takes the last two by default.

    The raw map is (N, K, h, w), of the grid of the patches.

    Raises:
        ValueError: the network is no sequence of blocks with attention over the grid.
    """
    if model.attention is None:
        raise ValueError("this model has no blocks whose attention is over the places of the image")
    output, scored, matrices = model.attention.record(lambda: model.run(inputs))
    n, blocks = len(inputs), len(model.attention.blocks)
    goals = model.task.goals(output, targets, score=spec.score, run=model.run_images)
    fixed = [goals.by_name(image) for image in range(n)]
    of_blocks = model.task.goals(scored, fixed * blocks, score=spec.score, run=model.run_images)
    grid = model.model.grid(model.model.layers[0])
    maps = []
    yield
    for k in range(goals.width):
        gradients = model.gradients(of_blocks.score(k), matrices, retain_graph=k + 1 < goals.width)
        with torch.no_grad():
            # Rows are images by heads, together or apart: (N, heads and queries, keys).
            positive = [
                at_least_float32(torch.relu(gradient)).reshape(n, -1, gradient.shape[-1]) for gradient in gradients
            ]
            keys = torch.stack([of_matrix.mean(dim=1) for of_matrix in positive]).mean(dim=0)
            maps.append(to_map(keys.unsqueeze(2), grid))
        yield
    return RawMaps(goals, [torch.cat(maps, dim=1)])
