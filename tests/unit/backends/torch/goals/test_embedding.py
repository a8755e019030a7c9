"""Embeddings: the similarity to a reference, and its gradient by hand."""

import numpy as np
import pytest
import torch

from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.backends.torch.goals.embedding import Embedding
from heatlens_server.backends.torch.sources.output_reading import OutputReading
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.methods import Method, Metric, Score
from heatlens_server.core.targets import Similarity, TopK
from heatlens_server.imaging.preprocess import normalise
from task_models import by_hand, embedder, photos, raw, recorded


@pytest.fixture(scope="module")
def engine():
    engine = TorchEngine(embedder(), device="cpu")
    yield engine
    engine.close()


def run(engine, image, target, spec):
    if not spec.in_steps:
        return engine.explain(image[None], [target], spec)[0]
    steps = engine.steps(image, target, spec, rows=16)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


@pytest.mark.parametrize("score", [Score.LOGIT, Score.PROBABILITY])
def test_similarity_and_gradient_by_hand(engine, score):
    model, image = embedder(), photos()[0]
    reference = np.random.default_rng(0).normal(size=model.class_count).astype(np.float32)
    inputs = torch.from_numpy(normalise(image, model.preprocess))[None]
    activations, embedding = recorded(model.module, model.layers[0], inputs)
    wanted = torch.from_numpy(reference)
    similarity = (embedding[0] @ wanted) / (embedding[0].norm() * wanted.norm())
    (gradient,) = torch.autograd.grad(similarity, activations)
    expected = by_hand(Method.GRAD_CAM, activations, gradient) * (0.5 if score is Score.PROBABILITY else 1.0)
    assert expected.max() > 0
    spec = MapSpec(Method.GRAD_CAM, model.layers[:1], upsample=False, score=score)
    result = run(engine, image, Similarity(reference), spec)
    np.testing.assert_allclose(raw(result, 0), expected, atol=1e-4 * expected.max())
    (finding,) = result.findings
    assert finding.logit == pytest.approx(float(similarity.detach()), abs=1e-5)
    assert finding.probability == pytest.approx((1 + float(similarity.detach())) / 2, abs=1e-5)
    np.testing.assert_allclose(result.embedding, embedding[0].detach(), rtol=1e-4, atol=1e-6)
    assert result.class_ids == (0,)
    assert result.logits.shape == (0,)


@pytest.mark.parametrize("largest", [1e-45, 1e-30, 1.0, 3e38])
def test_references_of_any_scale(engine, largest):
    image = photos()[0]
    spec = MapSpec(Method.GRAD_CAM, engine.info.layers[:1], upsample=False)
    # Signs: at the smallest scale float32 has nothing else.
    signs = np.sign(np.random.default_rng(0).normal(size=engine.info.class_count)).astype(np.float32)
    expected = run(engine, image, Similarity(signs), spec)
    assert abs(expected.findings[0].logit) > 0.01
    found = run(engine, image, Similarity(signs * np.float32(largest)), spec)
    assert found.findings[0].logit == pytest.approx(expected.findings[0].logit, rel=1e-5)
    np.testing.assert_allclose(found.maps, expected.maps, atol=2e-3)


def test_references_may_be_images_and_mixed_in_a_batch(engine):
    images = photos()
    spec = MapSpec(Method.HI_RES_CAM, engine.info.layers[:1], upsample=True)
    embedding = run(engine, images[2], Similarity(images[0]), spec).embedding
    targets = [Similarity(embedding), Similarity(images[2]), Similarity(images[2])]
    together = engine.explain(images, targets, spec)
    for image, target, result in zip(images, targets, together, strict=True):
        alone = run(engine, image, target, spec)
        np.testing.assert_allclose(result.maps, alone.maps, atol=2e-3)
        assert result.findings[0].logit == pytest.approx(alone.findings[0].logit, abs=1e-5)
    by_vector = run(engine, images[1], Similarity(embedding), spec)
    np.testing.assert_allclose(by_vector.maps, together[1].maps, atol=2e-3)
    # An image is like itself, and nothing raises that.
    assert together[2].findings[0].logit == pytest.approx(1, abs=1e-5)
    assert not together[2].maps.any()


def test_every_method_gives_finite_maps_and_measures(engine):
    assert engine.info.class_count == 24
    assert engine.info.scores == (Score.LOGIT, Score.PROBABILITY)
    assert Method.CAM not in engine.info.methods
    target = Similarity(photos()[1])
    for method in engine.info.methods:
        if method is Method.SS_CAM:  # Score-CAM 35 times over
            continue
        result = run(engine, photos()[0], target, MapSpec(method, engine.info.layers[1:2], upsample=False))
        assert np.isfinite(result.maps).all(), method
        assert (result.scales > 0).any(), method
    metrics = (Metric.DELETION, Metric.MODEL_RANDOMISATION)
    spec = MapSpec(Method.GRAD_CAM, engine.info.layers[:1], upsample=False, metrics=metrics, augment=True)
    (measures,) = run(engine, photos()[0], target, spec).faithfulness
    assert 0 <= measures[Metric.DELETION] <= 1


def test_targets_of_other_tasks_are_refused():
    with pytest.raises(TypeError, match="explains similarities"):
        Embedding(OutputReading()).goals(torch.zeros(1, 4), [TopK(1)], score=Score.LOGIT, run=lambda _: None)
