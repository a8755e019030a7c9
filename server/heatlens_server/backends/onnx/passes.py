"""A network as graphs: its forward pass, the backward pass of its tail, its tail alone. Needs no package but numpy."""

from collections.abc import Mapping
from dataclasses import dataclass

from heatlens_server.backends.onnx.packed import PackedGraph


@dataclass(frozen=True, slots=True, eq=False)
class Passes:
    """The forward pass of a network, and the backward pass by some of its layers.

    What the backward pass reads of the forward pass are its inputs. So one run forward serves any number of classes and
    any function of the scores: what is differentiated is told by `seeds`, the gradient of it by the scores.

    Attributes:
        forward: from the image to the scores; returns also layers and `kept`.
        backward: takes `kept` and `seeds`; None if nothing is to be differentiated.
        image: the forward pass's input.
        scores: outputs of the forward pass that are differentiated, or looked at.
        layers: by layer, the forward pass's output that is its activations.
        kept: outputs of the forward pass that are inputs of the backward pass.
        seeds: by name in `scores`, an input of the backward pass, of the same shape.
        gradients: by layer, an output of the backward pass, of the activations' shape.
    """

    forward: PackedGraph
    backward: PackedGraph | None
    image: str
    scores: tuple[str, ...]
    layers: Mapping[str, str]
    kept: tuple[str, ...]
    seeds: Mapping[str, str]
    gradients: Mapping[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class Tail:
    """What comes behind a layer: from its activations to the scores, of any number of rows.

    Attributes:
        graph: takes the layer's activations and `kept`, of as many rows.
        layer: its input that is the activations.
        scores: its outputs, those of `Passes`.
        kept: by name, values that bypass the layer, and the axis of the images in each; inputs too.
        before: from the image to `kept`; None if that is nothing, or the image alone.
        image: the input of `before`.
    """

    graph: PackedGraph
    layer: str
    scores: tuple[str, ...]
    kept: Mapping[str, int]
    before: PackedGraph | None
    image: str
