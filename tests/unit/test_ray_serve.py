"""How many replicas Ray is told to run, and what is refused."""

import warnings
from types import SimpleNamespace

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Ray's own code
    from ray.serve.config import AutoscalingConfig

    from heatlens_server.ray_serve import app, by_queue_length

from heatlens_server.core.errors import ConfigError


@pytest.mark.parametrize(
    ("wanted", "calls", "now", "expected"),
    [
        ([2.5, 0.5], 0, 1, 3),  # long queues make more
        ([0.1, 0.1], 100, 2, 2),  # calls alone do not
        ([0.1, 0.1, 0.1], 8, 3, 1),  # fewer, if the calls fit
        ([0.1, 0.1, 0.1, 0.1], 17, 4, 3),
        ([1.5, 0.0, 0.0], 0, 3, 2),  # and if the images do
        ([], 100, 2, 2),  # nobody has told yet
    ],
)
def test_replicas_by_queues_and_calls(wanted, calls, now, expected):
    context = SimpleNamespace(
        aggregated_metrics={"wanted_replicas": dict(enumerate(wanted))},
        total_num_requests=calls,
        target_num_replicas=now,
        config=AutoscalingConfig(target_ongoing_requests=8),
    )
    assert by_queue_length(context) == (expected, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"replica": 2}, "args: unknown: replica; known: config, replicas"),
        ({"config": "/none.toml"}, "/none.toml"),
        ({"replicas": "two"}, "args: replicas: expected int, got 'two'"),
        ({"replicas": 2.5}, "args: replicas: expected int, got 2.5"),
        ({"num_cpus": True}, "args: num_cpus: expected float, got True"),
        ({"num_cpus": -1}, "num_cpus: is less than 0"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas: is less than replicas"),
        ({"target_queue_length": 8}, "target_queue_length: needs max_replicas"),
    ],
)
def test_the_builder_for_serves_own_files_refuses_what_is_wrong(arguments, message):
    with pytest.raises(ConfigError, match=message):
        app(arguments)
