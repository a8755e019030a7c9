"""Every method of one pass, by name."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import Tensor

from heatlens_server.backends.torch.network.network import TorchModel
from heatlens_server.backends.torch.passes.closed_form import closed_form
from heatlens_server.backends.torch.passes.full_grad import full_grad
from heatlens_server.backends.torch.passes.guided_grad_cam import guided_grad_cam
from heatlens_server.backends.torch.passes.le_grad import le_grad
from heatlens_server.backends.torch.passes.one_pass import OnePass, PassSteps
from heatlens_server.backends.torch.passes.shapley_cam import shapley_cam
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import Target

PASSES: Mapping[Method, OnePass] = MappingProxyType(
    {
        Method.SHAPLEY_CAM: shapley_cam,
        Method.FULL_GRAD: full_grad,
        Method.LE_GRAD: le_grad,
        Method.GUIDED_GRAD_CAM: guided_grad_cam,
    }
)
"""The methods of one pass that are no closed forms."""


def explain(model: TorchModel, inputs: Tensor, targets: Sequence[Target], spec: MapSpec) -> PassSteps:
    """Explain inputs (N, C, H, W) with any method of one pass. Resume it with gradients enabled."""
    explained = yield from PASSES.get(spec.method, closed_form)(model, inputs, targets, spec)
    if spec.method.traits.always_at_input_size:
        return explained
    return explained.on_image(model, (inputs.shape[2], inputs.shape[3]))
