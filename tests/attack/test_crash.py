"""A model whose native code crashes, leaks or hangs, in a process of its own: the others do not notice."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc, method_pb2
from messages import Details, distinct, pixels
from server_process import SETTLE_TIMEOUT_S, ServerProcess, start_server_process, until, wait_settled
from server_toml import model_toml, server_toml

MAX_RSS_BYTES = 800_000_000
CRASHES = model_toml("crashes") + f'\nisolation = "process"\nmax_rss_bytes = {MAX_RSS_BYTES}\nhang_after_s = 3'
IMAGE = pixels(distinct(1)[0])


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """A server with a model in a process of its own, and one without."""
    started = start_server_process(tmp_path_factory.mktemp("crash"), server_toml(CRASHES, model_toml("tiny")))
    try:
        wait_settled(started.address)
        yield started
        started.process.terminate()
        assert started.process.wait(SETTLE_TIMEOUT_S) == 0
    finally:
        started.process.kill()
        started.process.wait()


def explain(running: ServerProcess, model: str, method: int = 0) -> pb.ExplainResponse:
    request = pb.ExplainRequest(model=model, image=IMAGE, options=pb.ExplainOptions(method=method))
    with grpc.insecure_channel(running.address) as channel:
        return explain_pb2_grpc.ExplainServiceStub(channel).Explain(request, timeout=SETTLE_TIMEOUT_S)


def order(running: ServerProcess, what: str) -> Path:
    """Tell the network what to do in its next run."""
    path = running.log_path.parent / "crash"
    path.with_suffix(".new").write_text(what)
    return path.with_suffix(".new").rename(path)


def children(running: ServerProcess) -> list[psutil.Process]:
    found = psutil.Process(running.process.pid).children()
    return [child for child in found if "heatlens_server.engine_process" in child.cmdline()]


def answers_again(running: ServerProcess) -> bool:
    try:
        return bool(explain(running, "crashes").explanations)
    except grpc.RpcError as error:
        reason = Details(error).info.reason
    assert reason in {"MODEL_CRASHED", "MODEL_HUNG"}
    return False


@pytest.mark.parametrize(
    ("what", "said", "method"),
    [
        ("SIGSEGV", "SIGSEGV", method_pb2.METHOD_GRAD_CAM),
        ("exit", "exit code 3", method_pb2.METHOD_GRAD_CAM),
        ("SIGKILL", "SIGKILL", method_pb2.METHOD_SCORE_CAM),
    ],
)
def test_a_crash_ends_its_own_process_alone(running, what, said, method):
    order(running, what)
    with ThreadPoolExecutor() as pool:
        crashed = pool.submit(explain, running, "crashes", method)
        others = [pool.submit(explain, running, "tiny") for _ in range(4)]
        error = crashed.exception()
        assert all(other.result().explanations for other in others)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert Details(error).info.reason == "MODEL_CRASHED"
    assert Details(error).has_retry
    until(lambda: f"its process ended by {said}" in running.log())
    until(lambda: answers_again(running))


def test_a_process_with_too_much_memory_is_started_again_between_batches(running):
    (before,) = children(running)
    order(running, "leak")
    # The batch that leaks is answered, and so is what comes while the process is started again.
    for _ in range(3):
        assert explain(running, "crashes").explanations
    (after,) = children(running)
    assert after.pid != before.pid
    assert after.memory_info().rss < MAX_RSS_BYTES
    assert "more than max_rss_bytes" in running.log()


def test_a_process_that_hangs_is_ended_and_started_again(running):
    order(running, "sleep")
    with pytest.raises(grpc.RpcError) as raised:
        explain(running, "crashes")
    assert Details(raised.value).info.reason in {"MODEL_HUNG", "MODEL_CRASHED"}
    assert explain(running, "tiny").explanations
    until(lambda: answers_again(running))


def test_a_process_that_is_stopped_amid_callers_that_leave_is_ended_and_started_again(running, sized):
    (child,) = children(running)
    steps = pb.ExplainOptions(method=method_pb2.METHOD_SCORE_CAM, class_ids=pb.ClassIds(values=range(8)))
    request = pb.ExplainRequest(model="crashes", image=IMAGE, options=steps)
    with grpc.insecure_channel(running.address, options=[("grpc.enable_retries", 0)]) as channel:
        stub = explain_pb2_grpc.ExplainServiceStub(channel)
        calls = [stub.Explain.future(request, timeout=SETTLE_TIMEOUT_S) for _ in range(sized(8, 40))]
        for call in calls[::2]:
            call.cancel()
        child.suspend()
        # Some may have been answered before.
        errors = [error for call in calls[1::2] if (error := call.exception()) is not None]
        assert {Details(error).info.reason for error in errors} <= {"MODEL_HUNG", "MODEL_CRASHED"}
        assert explain(running, "tiny").explanations
        if not errors:
            # All of them were: the next one is not.
            with pytest.raises(grpc.RpcError):
                explain(running, "crashes")
    until(lambda: answers_again(running))
    assert child not in children(running)


def test_the_process_ends_with_its_server(tmp_path, launch):
    running = launch(server_toml(CRASHES))
    wait_settled(running.address)
    (child,) = children(running)
    os.kill(running.process.pid, signal.SIGKILL)
    running.process.wait()
    child.wait(SETTLE_TIMEOUT_S)


def test_a_signal_to_the_whole_group_lets_calls_finish(tmp_path, launch):
    running = launch(server_toml(CRASHES))
    wait_settled(running.address)
    (child,) = children(running)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        child.send_signal(number)
    assert explain(running, "crashes").explanations
    assert children(running) == [child]
    running.process.terminate()
    assert running.process.wait(SETTLE_TIMEOUT_S) == 0
    child.wait(SETTLE_TIMEOUT_S)
