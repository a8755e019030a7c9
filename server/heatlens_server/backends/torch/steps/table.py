"""Every method that takes steps, by name."""

from collections.abc import Mapping
from types import MappingProxyType

from heatlens_server.backends.torch.steps.ablation_cam import ablation_cam
from heatlens_server.backends.torch.steps.job import Stepper
from heatlens_server.backends.torch.steps.recipro_cam import recipro_cam
from heatlens_server.backends.torch.steps.score_cam import is_cam, score_cam, ss_cam
from heatlens_server.backends.torch.steps.smooth_grad_cam import smooth_grad_cam_plus_plus_in_steps
from heatlens_server.core.methods import Method

STEPPERS: Mapping[Method, Stepper] = MappingProxyType(
    {
        Method.SMOOTH_GRAD_CAM_PLUS_PLUS: smooth_grad_cam_plus_plus_in_steps,
        Method.SCORE_CAM: score_cam,
        Method.SS_CAM: ss_cam,
        Method.IS_CAM: is_cam,
        Method.ABLATION_CAM: ablation_cam,
        Method.RECIPRO_CAM: recipro_cam,
    }
)
"""The methods of many runs."""
