"""Methods and all that is known about each, scores, aggregations, metrics, special class ids."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum, StrEnum, auto
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
    RISE = "rise"
    FULL_GRAD = "full-grad"
    LE_GRAD = "le-grad"
    GUIDED_GRAD_CAM = "guided-grad-cam"

    @property
    def traits(self) -> "MethodTraits":
        """Everything that is known about it."""
        return _TRAITS[self]

    @property
    def as_preset(self) -> "Preset":
        """What a request for it asks of an engine: another method with certain options, or the method itself."""
        return self.traits.preset or Preset(self)


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
    """A method with certain options.

    Attributes:
        method: which one; no preset.
        score: what it explains.
        aggregation: how it makes one map of several layers'.
        all_layers: whether it takes all the model's layers unless some are named.
    """

    method: Method
    score: Score = Score.LOGIT
    aggregation: Aggregation = Aggregation.MEAN
    all_layers: bool = False


class Procedure(Enum):
    """How an engine runs a method."""

    CLOSED_FORM = auto()
    """A function of one layer's activations and gradients: any engine, and exports can hold it."""
    ONE_PASS = auto()
    """One pass through the network, with more than a layer's activations and gradients: the torch engine."""
    STEPS = auto()
    """Many runs of the model per image, in steps between which others have the device: torch, graphs of networks."""
    PRESET = auto()
    """Not at all: it stands for another method with certain options, which is what engines get."""


@dataclass(frozen=True, slots=True)
class MethodTraits:
    """Everything that is known about a method. Of a preset only `preset`: ask the method that it stands for.

    Attributes:
        procedure: how it runs.
        needs_gradient: whether it differentiates the score. The others read activations, CAM also the head's weights.
        class_free: whether its map is the same for every class: it reads activations alone.
        default_layer_only: whether the exports that servers make are tried with it by the default layer alone, and hold
            it for no other where they hold maps. CAM is right for no other layer; the others keep a model's first start
            short.
        takes_multi_map_layers: whether it explains layers that return several maps at once. The other methods need the
            gradient or the places of one map.
        weights_activations: whether it sums weighted activations over channels: it can return their principal component
            instead.
        always_at_input_size: whether its maps are of the model's input size whatever size is asked for: it looks at no
            layer, or at the pixels too.
        looks_at_layers: whether a request's layers change its map.
        differentiates_twice: whether it differentiates each layer's gradient again, which takes long.
        preset: what a preset stands for.
    """

    procedure: Procedure
    needs_gradient: bool = False
    class_free: bool = False
    default_layer_only: bool = False
    takes_multi_map_layers: bool = False
    weights_activations: bool = False
    always_at_input_size: bool = False
    looks_at_layers: bool = True
    differentiates_twice: bool = False
    preset: Preset | None = None

    @property
    def exportable(self) -> bool:
        """Whether a graph can hold it."""
        return self.procedure is Procedure.CLOSED_FORM

    @property
    def exportable_scores(self) -> tuple[Score, ...]:
        """The scores that a graph can explain with it: what is not differentiated has no score but the logit."""
        return tuple(Score) if self.needs_gradient else (Score.LOGIT,)

    @property
    def in_steps(self) -> bool:
        """Whether it takes many runs of the model per image."""
        return self.procedure is Procedure.STEPS


_WEIGHTED_GRADIENTS = MethodTraits(Procedure.CLOSED_FORM, needs_gradient=True, weights_activations=True)
_CLASS_FREE = MethodTraits(Procedure.CLOSED_FORM, class_free=True, default_layer_only=True, takes_multi_map_layers=True)
_MASKS = MethodTraits(Procedure.STEPS, takes_multi_map_layers=True)
_AT_INPUT_SIZE = MethodTraits(Procedure.ONE_PASS, needs_gradient=True, always_at_input_size=True)

_TRAITS: Mapping[Method, MethodTraits] = MappingProxyType(
    {
        Method.CAM: MethodTraits(Procedure.CLOSED_FORM, default_layer_only=True, weights_activations=True),
        Method.GRAD_CAM: _WEIGHTED_GRADIENTS,
        Method.GRAD_CAM_PLUS_PLUS: _WEIGHTED_GRADIENTS,
        Method.HI_RES_CAM: _WEIGHTED_GRADIENTS,
        Method.X_GRAD_CAM: _WEIGHTED_GRADIENTS,
        Method.LAYER_CAM: _WEIGHTED_GRADIENTS,
        Method.ELEMENT_WISE_GRAD_CAM: _WEIGHTED_GRADIENTS,
        Method.EIGEN_CAM: _CLASS_FREE,
        Method.EIGEN_GRAD_CAM: MethodTraits(Procedure.CLOSED_FORM, needs_gradient=True, default_layer_only=True),
        Method.KPCA_CAM: _CLASS_FREE,
        Method.FEM: _CLASS_FREE,
        Method.RANDOM_CAM: _CLASS_FREE,
        Method.FINER_CAM: MethodTraits(Procedure.PRESET, preset=Preset(Method.GRAD_CAM, score=Score.CONTRAST)),
        Method.REFINE_CAM: MethodTraits(
            Procedure.PRESET, preset=Preset(Method.GRAD_CAM, aggregation=Aggregation.PRODUCT, all_layers=True)
        ),
        Method.SHAPLEY_CAM: MethodTraits(
            Procedure.ONE_PASS, needs_gradient=True, weights_activations=True, differentiates_twice=True
        ),
        Method.SMOOTH_GRAD_CAM_PLUS_PLUS: MethodTraits(Procedure.STEPS, needs_gradient=True),
        Method.SCORE_CAM: _MASKS,
        Method.SS_CAM: _MASKS,
        Method.IS_CAM: _MASKS,
        Method.ABLATION_CAM: _MASKS,
        Method.RECIPRO_CAM: MethodTraits(Procedure.STEPS),
        Method.RISE: MethodTraits(
            Procedure.STEPS, takes_multi_map_layers=True, always_at_input_size=True, looks_at_layers=False
        ),
        Method.FULL_GRAD: replace(_AT_INPUT_SIZE, looks_at_layers=False),
        Method.LE_GRAD: MethodTraits(Procedure.ONE_PASS, needs_gradient=True, looks_at_layers=False),
        Method.GUIDED_GRAD_CAM: _AT_INPUT_SIZE,
    }
)
"""One row per method."""

if missing := [method for method in Method if method not in _TRAITS]:
    raise TypeError(f"methods without traits: {', '.join(missing)}")

CLOSED_FORMS = tuple(method for method in Method if method.traits.procedure is Procedure.CLOSED_FORM)

PRESETS = tuple(method for method in Method if method.traits.procedure is Procedure.PRESET)


def name_of(method: Method, score: Score) -> Method:
    """What a method is called where it explains a score: a preset, if one stands for just these two, else itself."""
    return next((name for name in PRESETS if name.as_preset == Preset(method, score=score)), method)
