"""Devices that fail while others go on: their threads, and engines that fail when they are told to."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import DeviceOutOfMemory, InternalError, ModelInterrupted
from heatlens_server.scheduling import device_threads
from queue_engines import PATIENCE_S, POISON, STEPPED, BatchEngine, Rig, StepEngine, eventually


class Failing(StepEngine):
    """Raises `fault` in whatever it runs while there is one; steps go at once. POISON fails as it does elsewhere.

    Attributes:
        fault: what it raises.
        tried: how often it was tried by an image of nobody's.
    """

    def __init__(self, device: str, fault: BaseException | None = None) -> None:
        super().__init__(device=device)
        self.fault, self.tried = fault, 0
        self.run_all()

    def explain(self, *arguments: object) -> list:
        self._fail()
        return super().explain(*arguments)

    def steps(self, *arguments: object, rows: int):
        self._fail()
        return super().steps(*arguments, rows=rows)

    def try_out(self) -> None:
        """What a server tries an engine by."""
        self.tried += 1
        self._fail()

    def _fail(self) -> None:
        if self.fault is not None:
            raise self.fault


@pytest.fixture
def start(monkeypatch) -> Iterator[Callable[..., Rig]]:
    """Start devices that are tried again `retry_s` after they failed."""
    rigs: list[Rig] = []

    def start(*engines: BatchEngine, retry_s: float = 60.0) -> Rig:
        monkeypatch.setattr(device_threads, "FIRST_RETRY_S", retry_s)
        rigs.append(Rig(*engines, max_batch_size=4, try_out=lambda engine: engine.try_out()))
        rigs[-1].start()
        return rigs[-1]

    yield start
    for rig in rigs:
        for engine in rig.engines:
            engine.gate.set()
        rig.stop()


LOST = RuntimeError("the device is lost")


def failed_over(rig: Rig, broken: Failing, *spec: MapSpec) -> None:
    """Ask until the device has failed to run something; all are answered."""
    for value in range(250):
        if broken.tried:
            break
        assert rig.value(rig.put(value % 200, *spec)) == value % 200
    assert broken.tried == 2


@pytest.mark.parametrize("fault", [LOST, MemoryError()])
def test_what_a_device_fails_to_run_is_run_by_another_one_and_the_device_is_out(start, fault):
    broken, whole = Failing("cuda:0", fault), Failing("cuda:1")
    rig = start(broken, whole)
    failed_over(rig, broken)
    assert rig.batcher.devices.faults == ("its runs fail", "")
    assert rig.changes == [(0, "its runs fail")]
    assert [rig.value(entry) for entry in [rig.put(value) for value in range(20)]] == list(range(20))
    assert broken.tried == 2  # it rests


def test_a_device_works_again_once_an_image_of_nobodys_is_explained(start, caplog):
    broken, whole = Failing("cuda:0", LOST), Failing("cuda:1")
    rig = start(broken, whole, retry_s=0.01)
    for value in range(250):
        if not broken.tried:
            assert rig.value(rig.put(value % 200)) == value % 200
    eventually(lambda: broken.tried > 3)  # again and again
    assert rig.batcher.devices.faults[0]
    ran = len(broken.seen)
    broken.fault = None
    eventually(lambda: not rig.batcher.devices.faults[0])
    whole.gate.clear()
    entries = [rig.put(value) for value in range(8)]
    eventually(lambda: len(broken.seen) > ran)
    whole.gate.set()
    assert [rig.value(entry) for entry in entries] == list(range(8))
    assert rig.changes == [(0, "its runs fail"), (0, "")]
    assert "the device is lost" in caplog.text


def test_images_that_no_engine_explains_take_no_device_out(start):
    engines = Failing("cuda:0"), Failing("cuda:1")
    rig = start(*engines)
    for _ in range(8):
        assert isinstance(rig.outcome(rig.put(POISON)), InternalError)
    assert rig.batcher.devices.faults == ("", "")
    assert sum(engine.tried for engine in engines) == 8
    assert rig.value(rig.put(3)) == 3


def test_an_explanation_in_steps_begins_anew_on_another_device(start):
    broken, whole = Failing("cuda:0", LOST), Failing("cuda:1")
    rig = start(broken, whole)
    failed_over(rig, broken, STEPPED)
    assert rig.batcher.devices.faults[0] == "its runs fail"
    assert rig.value(rig.put(7, STEPPED)) == 7
    eventually(lambda: not whole.live)


def test_what_ended_a_process_is_not_given_to_another_one(start):
    crash = ModelInterrupted("m", "crashed, and is started again", reason="MODEL_CRASHED")
    broken, whole = Failing("cpu#0", crash), Failing("cpu#1")
    rig = start(broken, whole)
    whole.gate.clear()
    entries = [rig.put(value) for value in range(12)]
    eventually(lambda: rig.batcher.devices.faults[0] == "its process has ended")
    whole.gate.set()
    failed = [outcome for outcome in map(rig.outcome, entries) if isinstance(outcome, Exception)]
    assert [outcome.reason for outcome in failed] == ["MODEL_CRASHED"] * len(failed)
    assert 1 <= len(failed) <= 4  # one batch
    assert not broken.tried


def test_if_all_fail_callers_are_told_and_a_device_that_works_again_serves(start):
    engines = Failing("cuda:0", LOST), Failing("cuda:1", MemoryError())
    rig = start(*engines, retry_s=0.01)
    outcome = rig.outcome(rig.put(1))
    assert isinstance(outcome, InternalError | DeviceOutOfMemory)
    assert all(rig.batcher.devices.faults)
    waiting = rig.put(2)
    engines[1].fault = None
    assert rig.value(waiting) == 2
    eventually(lambda: rig.batcher.devices.faults == ("its runs fail", ""))


def test_closing_while_all_are_out_answers_what_waits(start):
    engines = Failing("cuda:0", LOST), Failing("cuda:1", LOST)
    rig = start(*engines)
    rig.outcome(rig.put(1))
    entries = [rig.put(2), rig.put(3, STEPPED)]
    rig.batcher.close()
    assert rig.join(PATIENCE_S)
    assert all(isinstance(rig.outcome(entry), InternalError) for entry in entries)


def test_what_a_device_holds_that_was_taken_out_is_freed_by_its_own_thread(start):
    engines = StepEngine(count=3, device="cuda:0"), StepEngine(count=3, device="cuda:1")
    for engine in engines:
        engine.gate.clear()
    rig = start(*engines)
    held = []
    for value in (1, 2):
        held.append(rig.put(value))
        eventually(lambda: sum(engine.entered.is_set() for engine in engines) == len(held))
    engines[0].gate.set()
    eventually(lambda: any(entry in rig.outcomes for entry in held))
    engines[0].gate.clear()
    entry = rig.put(3, STEPPED)
    assert engines[0].inside.acquire(timeout=PATIENCE_S)
    batch = rig.put(4)
    engines[0].entered.clear()
    engines[0].permits.release()
    assert engines[0].entered.wait(PATIENCE_S)  # by the batch, between two steps
    assert rig.batcher.devices.take_out(0, "said so")
    engines[0].gate.set()
    eventually(lambda: engines[0].freed_by)
    assert engines[0].freed_by == ["device-m-0"]
    engines[1].run_all()
    engines[1].gate.set()
    assert [rig.value(one) for one in (entry, batch)] == [3, 4]
    assert engines[1].begun == [(3, 4)]


def test_results_that_are_not_finite_are_a_devices_fault_if_its_trial_fails(start):
    class Blind(Failing):
        def explain(self, images, targets, spec):
            results = super().explain(images, targets, spec)
            for result in results:
                result.logits[:] = np.nan
            return results

        def try_out(self) -> None:
            self.tried += 1
            raise ValueError("scores or maps are not finite")

    blind, whole = Blind("cuda:0"), Failing("cuda:1")
    rig = start(blind, whole)
    failed_over(rig, blind)
    eventually(lambda: rig.batcher.devices.faults == ("its runs fail", ""))
