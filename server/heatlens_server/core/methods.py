"""Methods, scores, metrics and special class ids by name, without torch, so that validation can know them cheaply."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

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
    EIGEN_CAM = "eigen-cam"
    EIGEN_GRAD_CAM = "eigen-grad-cam"
    KPCA_CAM = "kpca-cam"
    FEM = "fem"
    RANDOM_CAM = "random-cam"
    FINER_CAM = "finer-cam"
    REFINE_CAM = "refine-cam"
    SHAPLEY_CAM = "shapley-cam"
    SMOOTH_GRAD_CAM_PLUS_PLUS = "smooth-grad-cam-plus-plus"
    SCORE_CAM = "score-cam"
    SS_CAM = "ss-cam"
    IS_CAM = "is-cam"
    ABLATION_CAM = "ablation-cam"
    RECIPRO_CAM = "recipro-cam"
    FULL_GRAD = "full-grad"
    LE_GRAD = "le-grad"
    GUIDED_GRAD_CAM = "guided-grad-cam"

    @property
    def needs_gradient(self) -> bool:
        """Whether a closed form differentiates the score. The others read activations, CAM also the head's weights."""
        return self not in _WITHOUT_GRADIENT

    @property
    def in_steps(self) -> bool:
        """Whether it takes many runs of the model per image: they go in steps, between which others have the device."""
        return self in _IN_STEPS


_WITHOUT_GRADIENT = frozenset({Method.CAM, Method.EIGEN_CAM, Method.KPCA_CAM, Method.FEM, Method.RANDOM_CAM})

_IN_STEPS = frozenset(
    {
        Method.SMOOTH_GRAD_CAM_PLUS_PLUS,
        Method.SCORE_CAM,
        Method.SS_CAM,
        Method.IS_CAM,
        Method.ABLATION_CAM,
        Method.RECIPRO_CAM,
    }
)

CLOSED_FORMS = (
    Method.CAM,
    Method.GRAD_CAM,
    Method.GRAD_CAM_PLUS_PLUS,
    Method.HI_RES_CAM,
    Method.X_GRAD_CAM,
    Method.LAYER_CAM,
    Method.ELEMENT_WISE_GRAD_CAM,
    Method.EIGEN_CAM,
    Method.EIGEN_GRAD_CAM,
    Method.KPCA_CAM,
    Method.FEM,
    Method.RANDOM_CAM,
)
"""Functions of activations and gradients, or of activations alone: see `cam.methods`. Exports can hold them."""

DEFAULT_LAYER_ONLY = frozenset(
    {
        Method.CAM,
        Method.EIGEN_CAM,
        Method.EIGEN_GRAD_CAM,
        Method.KPCA_CAM,
        Method.FEM,
        Method.RANDOM_CAM,
    }
)
"""Closed forms that the exports servers make hold for the default layer alone. CAM is right for no other; the others
keep a model's first start short, and torch has them for every layer."""

ACTIVATIONS_ALONE = frozenset({Method.EIGEN_CAM, Method.KPCA_CAM, Method.FEM, Method.RANDOM_CAM})
"""The closed forms that need nothing of a class: neither gradients nor, as CAM, the head's weights."""

OF_PYRAMIDS = ACTIVATIONS_ALONE | {Method.SCORE_CAM, Method.SS_CAM, Method.IS_CAM, Method.ABLATION_CAM}
"""Those that explain a layer which returns several maps at once. The others need the gradient or the places of one."""

WEIGHTED = frozenset(
    {
        Method.CAM,
        Method.GRAD_CAM,
        Method.GRAD_CAM_PLUS_PLUS,
        Method.HI_RES_CAM,
        Method.X_GRAD_CAM,
        Method.LAYER_CAM,
        Method.ELEMENT_WISE_GRAD_CAM,
        Method.SHAPLEY_CAM,
    }
)
"""Those that sum weighted activations over channels: their sum can be a principal component instead."""

AT_INPUT_SIZE = frozenset({Method.FULL_GRAD, Method.GUIDED_GRAD_CAM})
"""Their maps are of the model's input size whatever size is asked for: they look at no layer, or at the pixels too."""


class Score(StrEnum):
    """What is explained about a class: the scalar that is differentiated, or compared between changed inputs."""

    LOGIT = "logit"
    PROBABILITY = "probability"
    LOG_PROBABILITY = "log-probability"
    CONTRAST = "contrast"


class Aggregation(StrEnum):
    """How the maps of several layers, each normalised and resized, become one."""

    MEAN = "mean"
    MAX = "max"
    PRODUCT = "product"


class Metric(StrEnum):
    """A measure of how faithful a map is."""

    DELETION = "deletion"
    INSERTION = "insertion"
    ROAD_MORF = "road-morf"
    ROAD_LERF = "road-lerf"
    ROAD_COMBINED = "road-combined"
    AVERAGE_DROP = "average-drop"
    INCREASE = "increase"
    SPARSENESS = "sparseness"
    MODEL_RANDOMISATION = "model-randomisation"
    CLASS_SENSITIVITY = "class-sensitivity"


@dataclass(frozen=True, slots=True)
class Preset:
    """A method that is another one with certain options.

    Attributes:
        method: the other one.
        score: what it explains.
        aggregation: how it makes one map of several layers'.
        all_layers: whether it takes all the model's layers unless some are named.
    """

    method: Method
    score: Score = Score.LOGIT
    aggregation: Aggregation = Aggregation.MEAN
    all_layers: bool = False


PRESETS: Mapping[Method, Preset] = MappingProxyType(
    {
        Method.FINER_CAM: Preset(Method.GRAD_CAM, score=Score.CONTRAST),
        Method.REFINE_CAM: Preset(Method.GRAD_CAM, aggregation=Aggregation.PRODUCT, all_layers=True),
    }
)
"""Engines never see these: a request for one is a request for what it stands for."""


def name_of(method: Method, score: Score) -> Method:
    """What a method is called where it explains a score: a preset, if one stands for just these two, else itself."""
    return next((name for name, preset in PRESETS.items() if preset == Preset(method, score=score)), method)
