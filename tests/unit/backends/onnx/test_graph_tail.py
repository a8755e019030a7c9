"""What comes behind a layer: many changed activations in one run where that is right, one by one where it is not."""

import numpy as np
import pytest

import tiny_models
from bypassing_networks import BYPASSING, Residual
from heatlens_server.backends.onnx.graph_network import GraphNetwork
from heatlens_server.backends.onnx.providers import ON_CPU, load_runtime
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import ClassIds
from loaded_models import loaded, noise
from onnx_files import as_file

SPEC = MapSpec(Method.ABLATION_CAM, ("body",), upsample=False)
ALL = ClassIds(tuple(range(10)))


def network_of(module):
    return GraphNetwork(as_file(loaded(module)), load_runtime(), ON_CPU, threads=1)


def job_of(network, image):
    (job,) = network.jobs(network.inputs(image[None]), ALL, SPEC, rows=8)
    return job, network.tail("body", network.given(job.inputs), job.output)


@pytest.mark.parametrize("kind", BYPASSING)
def test_rows_are_those_of_the_network_row_by_row(kind):
    network, (image, other) = network_of(kind()), noise(2)
    job_of(network, other)
    job, tail = job_of(network, image)
    assert tail.takes_rows == BYPASSING[kind]
    kept = tail.kept(network.given(job.inputs))
    rows = np.concatenate([job.output, 0 * job.output, job.output[:, ::-1], job.output + 1])
    (found,) = tail.run(rows, kept).values()
    (whole,) = network.scores(job.inputs, ("body",)).values()
    np.testing.assert_allclose(found[:1], whole, atol=1e-5)
    for n, row in enumerate(rows):
        (alone,) = tail.run(row[None], kept).values()
        np.testing.assert_allclose(found[n : n + 1], alone, atol=1e-5)
    assert np.abs(found - found[0]).max(1)[1:].min() > 1e-4


def test_scores_are_those_of_the_image_that_is_explained():
    network, images = network_of(Residual()), noise(2)
    jobs = [job_of(network, image)[0] for image in images]
    for job in jobs:
        expected = job.scores_of_inputs(job.inputs)
        np.testing.assert_allclose(job.scores_of_levels(lambda levels: levels, 1), expected, atol=1e-5)


def test_nothing_is_computed_before_the_layer_if_nothing_bypasses_it():
    tail = as_file(loaded(tiny_models.tiny_mlp(), ("body", "stem"))).tail("stem")
    assert (tail.kept, tail.before) == ({}, None)
    assert tail.scores == ("logits",)
    assert not any("stem" in name for name in tail.graph.weights)
    assert any("body" in name for name in tail.graph.weights)
