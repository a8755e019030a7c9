"""Two engines as one: which runs what, when the second one is loaded, and what becomes of it. Both are fakes."""

import dataclasses
import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from heatlens_server.core.engine import Capabilities, MapSpec, Steps
from heatlens_server.core.errors import InvalidArgument, ModelLoadError
from heatlens_server.core.methods import Aggregation, Method, Metric, Score
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import Target, TopK
from heatlens_server.core.tasks import Task
from heatlens_server.fleet.fallback_engine import FallbackEngine

PATIENCE_S = 20
EXPORTED = (Method.CAM, Method.GRAD_CAM)
TORCH = (Method.CAM, Method.GRAD_CAM, Method.SHAPLEY_CAM, Method.SCORE_CAM)
INFO = Capabilities(
    "onnxruntime", "cpu", "fp32", 4, 4, 10, EXPORTED, ("body", "stem"), layers_by_method={Method.CAM: ("body",)}
)
TORCH_INFO = dataclasses.replace(INFO, engine_name="torch", methods=TORCH, scores=tuple(Score), has_options=True)
PLAIN = MapSpec(Method.GRAD_CAM, ("body",), upsample=False)
SCORE_CAM = dataclasses.replace(PLAIN, method=Method.SCORE_CAM)
IMAGES = np.zeros((1, 4, 4, 3), np.uint8)


class Engine:
    """Remembers what it ran."""

    def __init__(self, info: Capabilities) -> None:
        self.info = info
        self.ran: list[MapSpec] = []
        self.closed = 0

    def explain(self, images: np.ndarray, targets: Sequence[Target], spec: MapSpec) -> list[ImageResult]:
        self.ran.append(spec)
        return []

    def can(self, spec: MapSpec) -> bool:
        plain = not (spec.in_steps or spec.principal or spec.return_mask)
        return plain and spec.method in EXPORTED and spec.score in INFO.scores and set(spec.layers) <= set(INFO.layers)

    def steps(self, image: np.ndarray, target: Target, spec: MapSpec, *, rows: int) -> Steps:
        self.ran.append(spec)
        yield
        raise AssertionError

    def close(self) -> None:
        self.closed += 1


class Pair:
    """A pair of engines, and how often the second one was made."""

    def __init__(self, before: Callable[[], None] = lambda: None, info: Capabilities = TORCH_INFO) -> None:
        self.primary, self.companion, self.made = Engine(INFO), Engine(info), 0
        self.before = before
        self.engine = FallbackEngine(self.primary, self._make, methods=TORCH)

    def _make(self) -> Engine:
        self.made += 1
        self.before()
        return self.companion


def changed(**changes: object) -> MapSpec:
    return dataclasses.replace(PLAIN, **changes)


TWO = {"layers": ("stem", "body")}


@pytest.mark.parametrize(
    "spec",
    [
        PLAIN,
        changed(method=Method.CAM),
        changed(**TWO, upsample=True),
        changed(aggregation=Aggregation.MAX),
        changed(**TWO, aggregation=Aggregation.PRODUCT),
    ],
)
def test_what_the_primary_can_it_does_and_nothing_is_loaded(spec):
    pair = Pair()
    assert pair.engine.is_loaded_for(spec)
    pair.engine.load_for(spec)
    pair.engine.explain(IMAGES, [TopK(1)], spec)
    assert (pair.primary.ran, pair.made) == ([spec], 0)


@pytest.mark.parametrize(
    "spec",
    [
        SCORE_CAM,
        changed(method=Method.SHAPLEY_CAM),
        changed(score=Score.PROBABILITY),
        changed(augment=True),
        changed(principal=True),
        changed(metrics=(Metric.DELETION,)),
        changed(return_mask=True),
        changed(layers=("elsewhere",)),
    ],
)
def test_all_else_is_for_the_companion_which_is_loaded_once(spec):
    pair = Pair()
    assert not pair.engine.is_loaded_for(spec)
    for _ in range(2):
        pair.engine.load_for(spec)
    assert pair.engine.is_loaded_for(spec)
    if spec.in_steps:
        next(pair.engine.steps(IMAGES[0], TopK(1), spec, rows=1))
    else:
        pair.engine.explain(IMAGES, [TopK(1)], spec)
    pair.engine.explain(IMAGES, [TopK(1)], PLAIN)
    assert (pair.companion.ran, pair.primary.ran, pair.made) == ([spec], [PLAIN], 1)


def test_a_primary_that_takes_steps_runs_them():
    class Stepping(Engine):
        def can(self, spec: MapSpec) -> bool:
            return spec.method is Method.SCORE_CAM

    primary, companion = Stepping(INFO), Engine(TORCH_INFO)
    engine = FallbackEngine(primary, lambda: companion, methods=TORCH)
    other = changed(augment=True)
    for spec in (SCORE_CAM, other):
        next(engine.steps(IMAGES[0], TopK(1), spec, rows=1))
    assert (primary.ran, companion.ran) == ([SCORE_CAM], [other])


def test_layers_that_the_export_lacks_are_offered_and_run_by_the_second_engine():
    ran = Engine(dataclasses.replace(TORCH_INFO, layers=("body", "stem", "neck")))
    engine = FallbackEngine(Engine(INFO), lambda: ran, methods=TORCH, layers=("stem", "neck"))
    assert engine.info.layers == ("body", "stem", "neck")
    spec = dataclasses.replace(PLAIN, layers=("neck",))
    assert not engine.is_loaded_for(spec)
    engine.explain(IMAGES, [TopK(1)], spec)
    assert ran.ran == [spec]
    # Without a second engine nothing could run them.
    assert FallbackEngine(Engine(INFO), layers=("neck",)).info.layers == INFO.layers


def test_what_both_have_is_told_without_loading_anything():
    pair = Pair()
    info = pair.engine.info
    assert (info.methods, info.fallback_methods) == (TORCH, frozenset({Method.SHAPLEY_CAM, Method.SCORE_CAM}))
    assert (info.engine_name, info.scores, info.has_options, info.layers) == (
        "onnxruntime",
        tuple(Score),
        True,
        INFO.layers,
    )
    assert info.fallback_scores == {*Score} - {Score.LOGIT}
    assert (info.layers_of(Method.CAM), INFO.layers_of(Method.CAM)) == (("body", "stem"), ("body",))
    assert info.requestable_methods == (
        Method.CAM,
        Method.GRAD_CAM,
        Method.FINER_CAM,
        Method.REFINE_CAM,
        Method.SHAPLEY_CAM,
        Method.SCORE_CAM,
    )
    assert pair.made == 0


def test_without_a_companion_it_is_the_primary():
    engine = FallbackEngine(Engine(INFO))
    assert engine.info == INFO
    assert engine.info.requestable_methods == (*EXPORTED, Method.REFINE_CAM)
    assert engine.is_loaded_for(SCORE_CAM)  # there is nothing to load
    with pytest.raises(InvalidArgument, match="no graph for grad-cam of 'stem', 'elsewhere' with these options"):
        engine.explain(IMAGES, [TopK(1)], changed(layers=("stem", "elsewhere")))
    engine.close()
    assert engine.primary.closed == 1


def test_threads_that_need_it_at_once_load_it_once_while_the_primary_runs():
    gate, entered = threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        assert gate.wait(PATIENCE_S)

    pair = Pair(wait)
    threads = [threading.Thread(target=pair.engine.load_for, args=(SCORE_CAM,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert entered.wait(PATIENCE_S)
    assert not pair.engine.is_loaded_for(SCORE_CAM)
    pair.engine.explain(IMAGES, [TopK(1)], PLAIN)
    gate.set()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert pair.engine.is_loaded_for(SCORE_CAM)
    assert pair.made == 1


def test_a_load_that_failed_is_tried_again():
    failures = [ModelLoadError("no weights")]

    def fail_once() -> None:
        if failures:
            raise failures.pop()

    pair = Pair(fail_once)
    with pytest.raises(ModelLoadError, match="no weights"):
        pair.engine.load_for(SCORE_CAM)
    assert not pair.engine.is_loaded_for(SCORE_CAM)
    pair.engine.load_for(SCORE_CAM)
    assert (pair.engine.is_loaded_for(SCORE_CAM), pair.made) == (True, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": EXPORTED}, "has no score-cam, shapley-cam"),
        ({"class_count": 11}, "not the one that was exported"),
        ({"layers": ("body",)}, "not the one that was exported"),
        ({"task": Task.SEGMENTATION}, "not the one that was exported"),
    ],
)
def test_a_companion_that_is_not_what_was_said_is_not_used(changes, message):
    pair = Pair(info=dataclasses.replace(TORCH_INFO, **changes))
    with pytest.raises(ModelLoadError, match=message):
        pair.engine.load_for(SCORE_CAM)
    assert pair.companion.closed == 1
    assert not pair.engine.is_loaded_for(SCORE_CAM)


def test_closing_closes_both():
    pair = Pair()
    pair.engine.load_for(SCORE_CAM)
    pair.engine.close()
    pair.engine.close()
    assert (pair.primary.closed, pair.companion.closed) == (2, 1)


def test_closing_during_a_load_does_not_wait_for_it_and_leaves_nothing_open():
    pair = Pair(lambda: pair.engine.close())  # noqa: PLW0108 - there is no pair yet
    with pytest.raises(ModelLoadError, match="shutting down"):
        pair.engine.load_for(SCORE_CAM)
    assert (pair.primary.closed, pair.companion.closed) == (1, 1)
