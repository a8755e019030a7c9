"""Softmax or sigmoid: by the number of output channels, by the configuration, and what is refused."""

import pytest

from heatlens_server.backends.torch.sources.load import load_model
from heatlens_server.config import ModelConfig
from heatlens_server.core.errors import ModelLoadError


def load(factory, task="segmentation", **options):
    return load_model(ModelConfig(name="m", source=f"python:{factory}", task=task, **options))


@pytest.mark.parametrize(
    ("factory", "options", "threshold", "assumed"),
    [
        ("one", {}, 0.5, "one output channel: its sigmoid is the probability of class 0"),
        ("one", {"threshold": 0.25}, 0.25, "predicted as it above 0.25; set threshold"),
        ("one", {"activation": "sigmoid"}, 0.5, None),
        (
            "three",
            {},
            None,
            '3 output channels are taken to exclude each other (softmax); if they may overlap, set activation = "sig',
        ),
        ("three", {"activation": "softmax"}, None, None),
        ("three", {"activation": "sigmoid", "threshold": 0.75}, 0.75, None),
        ("three_sigmoid", {}, 0.5, "ends in a sigmoid: classes may overlap, and a pixel is predicted as each"),
        ("three_softmax", {}, None, None),
        ("three_log_softmax", {}, None, None),
        ("three_in_object", {"activation": "sigmoid"}, 0.5, None),
        ("one_squeezed", {"activation": "sigmoid"}, 0.5, None),
    ],
)
def test_classes_of_pixels(factory, options, threshold, assumed):
    model = load(f"mask_models:{factory}", **options)
    assert model.threshold == threshold
    assert assumed is None or any(assumed in sentence for sentence in model.assumptions)
    assert any("exclude" in sentence or "threshold" in sentence for sentence in model.assumptions) == bool(assumed)


def test_networks_of_torchvision_are_known():
    model = load_model(ModelConfig(name="m", source="torchvision:lraspp_mobilenet_v3_large", weights="none"))
    assert (model.threshold, model.assumptions) == (None, ())


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        ("mask_models:one", {"activation": "softmax"}, 'activation: .* one output channel, .* set "sigmoid"'),
        (
            "mask_models:three_sigmoid",
            {"activation": "softmax"},
            'activation: .* probabilities by sigmoid: set "sigmoid"',
        ),
        (
            "mask_models:three_in_tuple",
            {},
            r"of 0 \(1, 3, 256, 256\), 1 .*: set output to the one .* such as output = 0",
        ),
        ("mask_models:three_ids", {}, r"the scores that class ids are made of, not torch.int64 \(1, 256, 256\)"),
        ("mask_models:three_in_object", {"output": "out"}, "output: .* has no tensor 'out', only 'logits', 'features'"),
        ("mask_models:three", {"threshold": 0.5}, 'threshold: is for activation = "sigmoid"'),
        ("mask_models:three", {"activation": "softmax", "threshold": 0.5}, "threshold: is for activation"),
        (
            "tiny_models:tiny",
            {"task": "auto", "activation": "sigmoid"},
            "activation: is softmax for classif",
        ),
        (
            "tiny_models:tiny",
            {"task": "auto", "threshold": 0.5},
            "threshold: is for segmentation, .* for classification",
        ),
    ],
)
def test_refusals(factory, options, message):
    with pytest.raises(ModelLoadError, match=message):
        load(factory, **options)
