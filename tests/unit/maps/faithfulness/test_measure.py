"""All measures together: steps, sharing, and maps whose faithfulness is known."""

import pytest
import torch

from heatlens_server.core.methods import Metric
from heatlens_server.maps.faithfulness.measure import SANITY_CHECKS, measure
from heatlens_server.maps.faithfulness.perturbation import STEPS, blurred, deleted, inserted

SIZE = 24
RUN_BASED = tuple(metric for metric in Metric if metric not in {*SANITY_CHECKS, Metric.SPARSENESS})
# The original, deletion, insertion, the salient part, MoRF and LeRF.
ROWS_OF_ALL = 1 + STEPS + STEPS + 1 + 9 + 9


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def truth():
    """The pixels that the function below looks at, as a map without equal pixels among them."""
    saliency = torch.zeros(SIZE, SIZE)
    saliency[6:13, 10:17] = 0.5 + torch.rand(7, 7, generator=generator()) / 2
    return saliency


@pytest.fixture
def image():
    """Bright where it counts, so that removal shows; noise elsewhere."""
    image = torch.randn(3, SIZE, SIZE, generator=generator(1)) / 2
    image[:, 6:13, 10:17] += 2 * (torch.rand(7, 7, generator=generator(2)) > 0.5)
    return image


class Probability:
    """A function of the true pixels only. Counts what it is asked."""

    def __init__(self, image, truth):
        self.image, self.where, self.calls = image, truth > 0, []

    def __call__(self, images):
        assert images.dtype == self.image.dtype
        self.calls.append(len(images))
        distance = (images - self.image)[..., self.where].abs().mean((-2, -1))
        return torch.exp(-2 * distance) * 0.9


def drive(metrics, *, rows=100, **arguments):
    steps = measure(metrics, rows=rows, **arguments)
    count = 0
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value, count
        count += 1


@pytest.mark.parametrize("rows", [1, 7, 32, 500])
def test_steps_hold_at_most_so_many_rows(image, truth, rows):
    probability = Probability(image, truth)
    found, steps = drive(RUN_BASED, saliency=truth, image=image, probability=probability, rows=rows)
    assert len(probability.calls) == -(-ROWS_OF_ALL // rows)
    # Imputations are steps, too, of 3 images at most: 18 of them, some cut short by the end of a call.
    assert len(probability.calls) <= steps <= len(probability.calls) + 8
    assert steps >= 1 + 18 // min(3, rows) - 1
    assert max(probability.calls) <= rows
    assert sum(probability.calls) == ROWS_OF_ALL
    whole, _ = drive(RUN_BASED, saliency=truth, image=image, probability=Probability(image, truth))
    assert list(found) == list(RUN_BASED)
    assert found == pytest.approx(whole, abs=1e-5)


def test_nothing_runs_before_the_first_step_nor_after_close(image, truth):
    probability = Probability(image, truth)
    steps = measure([Metric.DELETION], saliency=truth, image=image, probability=probability, rows=4)
    assert probability.calls == []
    next(steps)
    steps.close()
    assert probability.calls == [4]


def test_the_true_map_beats_random_and_its_opposite(image, truth):
    random = torch.rand(SIZE, SIZE, generator=generator(5))
    of = {}
    for name, saliency in (("true", truth), ("random", random), ("opposite", 1 - truth)):
        of[name], _ = drive(RUN_BASED, saliency=saliency, image=image, probability=Probability(image, truth))
    for metric in (Metric.DELETION, Metric.ROAD_MORF, Metric.AVERAGE_DROP):
        assert of["true"][metric] < of["random"][metric] < of["opposite"][metric] + 1e-9, metric
    for metric in (Metric.INSERTION, Metric.ROAD_LERF, Metric.ROAD_COMBINED):
        assert of["true"][metric] - 0.05 > of["random"][metric] > of["opposite"][metric], metric
    assert of["true"][Metric.ROAD_COMBINED] > 0.1


def test_each_measure_alone_is_the_same_as_together(image, truth):
    together, _ = drive(RUN_BASED, saliency=truth, image=image, probability=Probability(image, truth))
    for metric in RUN_BASED:
        alone, _ = drive([metric], saliency=truth, image=image, probability=Probability(image, truth))
        assert alone == {metric: pytest.approx(together[metric], abs=1e-6)}


def test_deletion_and_insertion_by_hand(image, truth):
    probability = Probability(image, truth)
    found, _ = drive([Metric.INSERTION, Metric.DELETION], saliency=truth, image=image, probability=probability)
    with torch.no_grad():
        for metric, make in ((Metric.DELETION, deleted), (Metric.INSERTION, inserted)):
            curve = probability(make(image, truth, 0, STEPS + 1))
            assert found[metric] == pytest.approx(float(torch.trapezoid(curve.double(), dx=1 / STEPS)), abs=1e-6)
    assert list(found) == [Metric.INSERTION, Metric.DELETION]


def test_drop_and_increase(image, truth):
    """The masked image here has a third, then three times, of the image's probability."""
    for masked, drop, increase in ((0.2, 2 / 3, 0.0), (1.0, 0.0, 1.0), (0.6, 0.0, 0.0)):

        def probability(images, masked=masked):
            same = (images == image).all(-1).all(-1).all(-1)
            is_masked = (images == image * truth).all(-1).all(-1).all(-1)
            assert bool((same | is_masked).all())
            return torch.where(same, torch.tensor(0.6), torch.tensor(masked))

        found, _ = drive([Metric.AVERAGE_DROP, Metric.INCREASE], saliency=truth, image=image, probability=probability)
        assert found == {Metric.AVERAGE_DROP: pytest.approx(drop, abs=1e-6), Metric.INCREASE: increase}


def test_a_probability_of_zero_cannot_drop(image, truth):
    found, _ = drive(
        [Metric.AVERAGE_DROP], saliency=truth, image=image, probability=lambda images: torch.zeros(len(images))
    )
    assert found == {Metric.AVERAGE_DROP: 0}


def test_a_flat_map_says_nothing(image, truth):
    found, _ = drive(RUN_BASED, saliency=torch.zeros(SIZE, SIZE), image=image, probability=Probability(image, truth))
    assert found[Metric.ROAD_COMBINED] == pytest.approx(0, abs=1e-9)
    assert 0 <= found[Metric.DELETION] <= 1
    assert 0 <= found[Metric.INSERTION] <= 1
    assert found[Metric.INCREASE] == 0


def test_what_needs_no_run_has_none(image, truth):
    def probability(images):
        raise AssertionError

    metrics = [Metric.SPARSENESS, *SANITY_CHECKS]
    others = {Metric.MODEL_RANDOMISATION: 1 - truth, Metric.CLASS_SENSITIVITY: truth}
    found, steps = drive(metrics, saliency=truth, image=image, probability=probability, others=others)
    assert steps == 0
    assert found[Metric.MODEL_RANDOMISATION] == pytest.approx(-1)
    assert found[Metric.CLASS_SENSITIVITY] == pytest.approx(1)
    assert found[Metric.SPARSENESS] > 0.8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"saliency": torch.zeros(3, 4)}, r"saliency: must be \(24, 24\), not \(3, 4\)"),
        ({"rows": 0}, "rows: must be positive, not 0"),
        ({"metrics": [Metric.CLASS_SENSITIVITY]}, "others: must hold a map for class-sensitivity"),
    ],
)
def test_wrong_arguments(image, truth, change, message):
    arguments = {"metrics": [Metric.DELETION], "saliency": truth, "image": image, "probability": None, "rows": 1}
    with pytest.raises(ValueError, match=message):
        next(measure(**arguments | change))


def test_half_precision(image, truth):
    half = image.to(torch.bfloat16)
    found, _ = drive(RUN_BASED, saliency=truth, image=half, probability=Probability(half, truth))
    exact, _ = drive(RUN_BASED, saliency=truth, image=image, probability=Probability(image, truth))
    assert found == pytest.approx(exact, abs=0.02)
    assert blurred(half).dtype == torch.bfloat16
