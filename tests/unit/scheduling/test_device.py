"""What a device makes of batches, with engines that misbehave on purpose. The engine is the only fake here."""

from collections.abc import Sequence

import pytest

from heatlens_server.core.errors import DeviceOutOfMemory, InternalError, ModelInterrupted
from heatlens_server.scheduling.entry import Outcome, QueueResult
from queue_engines import NOT_FINITE, POISON, BatchEngine, Rig


def run(rig: Rig, values: Sequence[int]) -> list[Outcome]:
    """The outcomes of one batch."""
    entries = [rig.put(value) for value in values]
    rig.start()
    outcomes = [rig.outcome(entry) for entry in entries]
    rig.stop()
    return outcomes


def values_of(outcomes: Sequence[Outcome]) -> list[float | None]:
    return [float(o.result.logits[0]) if isinstance(o, QueueResult) else None for o in outcomes]


def test_every_entry_gets_its_own_result():
    rig = Rig(BatchEngine())
    outcomes = run(rig, range(8))
    assert values_of(outcomes) == list(range(8))
    assert all(outcome.timing.batch_size == 8 for outcome in outcomes)
    assert rig.events == [("batch of 8 started", "cpu"), ("batch of 8 ended, 0 failed", "cpu")]


def test_poison_image_fails_alone():
    rig = Rig(BatchEngine())
    outcomes = run(rig, [0, 1, 2, POISON, 4, 5, 6, 7])
    assert isinstance(outcomes[3], InternalError)
    assert values_of(outcomes) == [0, 1, 2, None, 4, 5, 6, 7]
    assert rig.events[-1] == ("batch of 8 ended, 1 failed", "cpu")


def test_out_of_memory_halves_until_it_fits():
    engine = BatchEngine(memory=2)
    assert values_of(run(Rig(engine), range(8))) == list(range(8))
    assert [len(batch) for batch in engine.seen] == [8, 4, 2, 2, 4, 2, 2]


def test_out_of_memory_on_one_image_is_said():
    assert all(isinstance(outcome, DeviceOutOfMemory) for outcome in run(Rig(BatchEngine(memory=0)), [1, 2]))


def test_a_batch_whose_process_has_ended_is_not_run_in_halves():
    runs = []

    class Gone(BatchEngine):
        def explain(self, images, targets, spec):
            runs.append(len(images))
            raise ModelInterrupted("m", "crashed", reason="MODEL_CRASHED", retry_after_s=0.5)

    outcomes = run(Rig(Gone()), range(4))
    assert [outcome.reason for outcome in outcomes] == ["MODEL_CRASHED"] * 4
    assert runs == [4]


def test_result_that_is_not_finite_fails_alone():
    outcomes = run(Rig(BatchEngine()), [1, NOT_FINITE, 3])
    assert isinstance(outcomes[1], InternalError)
    assert values_of(outcomes) == [1, None, 3]


def test_an_engine_that_gives_too_few_results_fails_the_batch_and_goes_on():
    engine = BatchEngine()
    explain, engine.explain = engine.explain, lambda images, targets, spec: []
    rig = Rig(engine)
    entries = [rig.put(value) for value in (1, 2)]
    rig.start()
    assert all(isinstance(rig.outcome(entry), InternalError) for entry in entries)
    engine.explain = explain
    assert rig.value(rig.put(3)) == 3
    rig.stop()


def test_failing_callback_does_not_end_the_loop():
    rig = Rig(BatchEngine())
    rig.failures_to_raise = 1
    rig.start()
    assert rig.value(rig.put(1)) == 1
    assert rig.value(rig.put(2)) == 2
    rig.stop()


@pytest.mark.parametrize("values", [[], [1], [1, POISON]])
def test_the_threads_end_when_their_batcher_is_closed(values: list[int]):
    run(Rig(BatchEngine()), values)
