"""Random weights are the same from start to start, whatever other threads draw meanwhile."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from heatlens_server.backends.torch.sources.own_generator import OwnGenerator
from heatlens_server.backends.torch.sources.sources import load_source
from heatlens_server.backends.torch.sources.weights import weights_version
from heatlens_server.config import ModelConfig

SOURCES = ("torchvision:resnet18", "timm:resnet10t", "timm:vit_tiny_patch16_224", "torchvision:mobilenet_v2")


def version(source):
    return weights_version(load_source(ModelConfig(name="m", source=source, weights="none")).module)


@pytest.fixture
def drawing():
    """Another thread draws from torch's generator all the time, as a network with dropout at inference does."""
    done = threading.Event()

    def draw():
        while not done.is_set():
            torch.nn.functional.dropout(torch.ones(1000))

    thread = threading.Thread(target=draw)
    thread.start()
    yield
    done.set()
    thread.join()


def test_models_that_load_side_by_side_while_others_draw(drawing):
    with ThreadPoolExecutor(len(SOURCES)) as pool:
        first, second = (list(pool.map(version, SOURCES)) for _ in range(2))
    assert first == second
    assert len(set(first)) == len(SOURCES)


START = """
import concurrent.futures, sys
from tests_of_random_weights import version
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    print(*pool.map(version, sys.argv[1:]))
"""


def test_two_starts(tmp_path):
    (tmp_path / "tests_of_random_weights.py").write_text(
        "from heatlens_server.backends.torch.sources.sources import load_source\n"
        "from heatlens_server.backends.torch.sources.weights import weights_version\n"
        "from heatlens_server.config import ModelConfig\n"
        "def version(source):\n"
        "    config = ModelConfig(name='m', source=source, weights='none')\n"
        "    return weights_version(load_source(config).module)\n"
    )
    command = [sys.executable, "-c", START, *SOURCES[::-1]]
    said = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.split()
    assert said[::-1] == [version(source) for source in SOURCES]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: torch.rand(3),
        lambda: torch.randn(3, 2),
        lambda: torch.randint(0, 100, (5,)),
        lambda: torch.randperm(9),
        lambda: torch.empty(4).normal_(),
        lambda: torch.empty(4).uniform_(),
        lambda: torch.nn.init.trunc_normal_(torch.empty(4)),
        lambda: torch.nn.init.orthogonal_(torch.empty(4, 4)),
        lambda: torch.nn.Linear(3, 3).weight.detach().clone(),
        lambda: torch.bernoulli(torch.full((9,), 0.5)),
        lambda: torch.normal(torch.zeros(3), torch.ones(3)),
    ],
)
def test_it_draws_what_torch_would_and_leaves_torchs_generator_alone(draw):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        expected = draw()
        state = torch.get_rng_state()
        with OwnGenerator():
            assert torch.equal(draw(), expected)
        assert torch.equal(torch.get_rng_state(), state)


def test_a_generator_that_is_given_is_used():
    with OwnGenerator():
        drawn = torch.rand(3, generator=torch.Generator().manual_seed(7))
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(7)))
