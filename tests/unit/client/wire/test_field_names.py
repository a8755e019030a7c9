"""What the server calls a field, the SDK calls by the argument that it comes from."""

import inspect

import pytest

from heatlens._wire.field_names import argument_of
from heatlens._wire.requests import OPTIONS
from heatlens._wire.streams import StreamOptions, stream_plan
from heatlens.v1 import explain_pb2


@pytest.mark.parametrize(
    ("path", "argument"),
    [
        ("options.layers[1]", "layers[1]"),
        ("config.options.layers", "layers"),
        ("options.class_ids.values[2]", "class_ids[2]"),
        # Their place is among the labels, not among what the caller gave.
        ("options.class_ids.labels[0]", "class_ids"),
        ("options.faithfulness.metrics[0]", "faithfulness[0]"),
        ("options.reference_embedding.shape", "reference"),
        ("options.reference_image.encoded", "reference"),
        ("options.mask.data", "mask"),
        ("options.smoothing.augmentation", "augment"),
        ("options.map_size", "map_size"),
        ("options.map_sizes", "options.map_sizes"),
        ("image", "image"),
        ("image.pixels.shape", "image"),
        ("frame.image.encoded", "frame"),
        ("config.temporal_smoothing", "smooth"),
        ("config.explain_every", "every"),
        ("config.model", "model"),
        ("model", "model"),
        ("config.options.new_option", "config.options.new_option"),
        ("service", "service"),
        ("", ""),
    ],
)
def test_paths(path, argument):
    assert argument_of(path) == argument


def test_every_field_of_the_options_is_some_option():
    for field in explain_pb2.ExplainOptions.DESCRIPTOR.fields:
        if field.name != "smoothing":
            assert argument_of(f"options.{field.name}") in OPTIONS


def test_every_setting_of_a_stream_is_some_argument():
    taken = StreamOptions.__optional_keys__ | set(inspect.signature(stream_plan).parameters)
    for field in explain_pb2.StreamConfig.DESCRIPTOR.fields:
        if field.name != "options":
            assert argument_of(f"config.{field.name}") in taken
