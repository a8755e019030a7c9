"""Several engines of one model, run at once by a thread each, answer as one alone does, and share its weights."""

import dataclasses
import gc
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny_models
from heatlens_server.backends.onnx.network_engine import NetworkEngine
from heatlens_server.backends.onnx.stored import read_network
from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.backends.torch.torchscript_engine import TorchScriptEngine
from heatlens_server.core.engine import Engine, MapSpec
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.methods import Method, Metric
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import ClassIds
from heatlens_server.fleet.fallback_engine import FallbackEngine
from loaded_models import bundle, hook_count, loaded, network, noise
from onnx_files import engine_of_file

BODY = MapSpec(Method.GRAD_CAM, ("body",), upsample=True)
TWO = ClassIds((3, 7))
IMAGES = noise(12)
BATCHED = (BODY, dataclasses.replace(BODY, method=Method.LAYER_CAM, layers=("stem",)))
STEPPED = (
    dataclasses.replace(BODY, method=Method.SCORE_CAM),
    dataclasses.replace(BODY, augment=True),
    dataclasses.replace(BODY, metrics=(Metric.DELETION,)),
)
ENGINES: dict[str, Callable[[LoadedModel], Engine]] = {
    "torch": lambda model: TorchEngine(model, device="cpu"),
    "onnxruntime": lambda model: NetworkEngine(read_network(*network(model)), device="cpu"),
    "torchscript": lambda model: TorchScriptEngine(*bundle(model), device="cpu"),
    "onnx file": engine_of_file,
    "torch beside torchscript": lambda model: FallbackEngine(
        TorchScriptEngine(*bundle(model), device="cpu"),
        lambda: TorchEngine(model, device="cpu"),
        methods=(Method.SCORE_CAM,),
    ),
}


def explained(engine: Engine, images: np.ndarray, specs: Sequence[MapSpec]) -> list[ImageResult]:
    results = []
    for spec in specs:
        if not spec.in_steps:
            results += engine.explain(images, [TWO] * len(images), spec)
            continue
        steps = engine.steps(images[0], TWO, spec, rows=4)
        try:
            while True:
                next(steps)
        except StopIteration as stop:
            results.append(stop.value)
    return results


@pytest.mark.parametrize("name", ENGINES)
def test_answers_of_two_that_run_at_once_are_those_of_one(name):
    model = loaded(tiny_models.tiny_mlp(), ("body", "stem"))
    specs = BATCHED if name == "torchscript" else (*BATCHED, *STEPPED)
    engine = ENGINES[name](model)
    expected = [explained(engine, images, specs) for images in np.split(IMAGES, 6)]
    engine.use_threads(1)
    other = engine.another()
    assert other.info == engine.info
    start = threading.Barrier(2)

    def run(one: Engine) -> list[list[ImageResult]]:
        start.wait()
        return [explained(one, images, specs) for images in np.split(IMAGES, 6)]

    with ThreadPoolExecutor(2) as threads:
        for found in threads.map(run, (engine, other)):
            for results, right in zip(found, expected, strict=True):
                for result, alone in zip(results, right, strict=True):
                    np.testing.assert_allclose(result.maps, alone.maps, atol=1e-6)
                    np.testing.assert_allclose(result.logits, alone.logits, atol=1e-5)
    # One goes on without the other.
    engine.close()
    assert other.explain(IMAGES[:1], [TWO], BODY)[0].is_finite
    other.close()


class Remembers(nn.Module):
    """A network that keeps what it computes on itself between two of its layers, as many do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 10)
        self.seen: Tensor | None = None
        self.meet: Callable[[], object] = lambda: None

    def forward(self, images: Tensor) -> Tensor:
        self.seen = self.body(images)
        self.meet()
        return self.head(self.seen.relu().mean((-2, -1)))


def test_networks_that_keep_what_they_compute_do_not_meet_in_torch_engines():
    network = Remembers()
    engine = TorchEngine(loaded(network))
    other = engine.another()
    alone = [one.explain(images, [TWO], BODY)[0] for one, images in ((engine, IMAGES[:1]), (other, IMAGES[1:2]))]
    # Both are inside of the network before either goes on. Copies have the attribute of the original.
    meeting = threading.Barrier(2)
    for module in (module for module in gc.get_objects() if isinstance(module, Remembers)):
        module.meet = lambda: meeting.wait(20)
    with ThreadPoolExecutor(2) as threads:
        runs = [
            threads.submit(one.explain, images, [TWO], BODY)
            for one, images in ((engine, IMAGES[:1]), (other, IMAGES[1:2]))
        ]
        for run, expected in zip(runs, alone, strict=True):
            np.testing.assert_allclose(run.result()[0].maps, expected.maps, atol=1e-6)


def test_torch_engines_share_the_weights_and_no_hooks():
    model = loaded(tiny_models.tiny_mlp(), ("body", "stem"))
    own = [hook_count(model.module), model.module.register_forward_hook(lambda *_: None)][0]
    engine = TorchEngine(model)
    others = [engine.another(), engine.another()]
    pointers = {parameter.data_ptr() for parameter in model.module.parameters()}
    networks = [
        module
        for module in gc.get_objects()
        if type(module) is type(model.module) and {one.data_ptr() for one in module.parameters()} == pointers
    ]
    assert len(networks) >= 3
    for one in (engine, *others):
        one.close()
    # Those of the network's own stay.
    assert {hook_count(module) for module in networks} == {own + 1}


def test_a_network_that_cannot_be_copied_is_said():
    class Single(Remembers):
        def __deepcopy__(self, memo: object) -> nn.Module:
            raise TypeError("secret")

    engine = TorchEngine(loaded(Single()))
    with pytest.raises(ModelLoadError, match=r"instances: the network cannot be copied \(TypeError\)"):
        engine.another()
    engine.close()


def test_threads_of_one_thread_are_not_those_of_others():
    engine = TorchEngine(loaded(tiny_models.tiny()))
    usual = torch.get_num_threads()
    counts = []

    def run(count: int | None) -> None:
        engine.use_threads(count)
        engine.explain(IMAGES[:1], [TWO], BODY)
        counts.append(torch.get_num_threads())

    for count in (usual + 1, None):
        thread = threading.Thread(target=run, args=(count,))
        thread.start()
        thread.join()
    assert counts == [usual + 1, usual]
    assert torch.get_num_threads() == usual
    engine.close()
