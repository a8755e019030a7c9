"""Every admitted entry ends once: a random walk over everything that can happen to a batcher."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from batching import ABLATION, IMAGE, LAYER, OTHER, STEPPED, Bench
from heatlens_server.core.errors import DeadlineExpired, QueueFull
from heatlens_server.scheduling.entry import Entry, EntryState, Source
from heatlens_server.scheduling.progress import Progress


class Accounts(RuleBasedStateMachine):
    """Every admitted entry is claimed, done in steps, expired or withdrawn, exactly once, whatever happens in between.

    And what is kept between two steps is given to be freed exactly when nobody else can free it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.at = Bench(max_batch_size=3, max_queue_length=4)
        self.sources: list[Source | None] = [None, Source(), Source()]
        self.preparing: list[Entry] = []
        self.waiting: list[Entry] = []
        self.stepping: list[Entry] = []
        self.kept: dict[Entry, Progress] = {}
        self.expected_discarded: list[Progress] = []
        self.discarded: list[Progress] = []
        self.ends: Counter[Entry] = Counter()
        self.admitted: list[Entry] = []
        self.running = False

    @rule(
        who=st.integers(0, 2),
        spec=st.sampled_from([LAYER, OTHER, STEPPED, ABLATION]),
        timeout_s=st.sampled_from([None, 0.5, 2.0]),
    )
    def admit(self, who, spec, timeout_s):
        callers = sum(entry.source is None for entry in self.preparing + self.waiting)
        try:
            entry = self.at.admit(spec, timeout_s, self.sources[who])
        except QueueFull:
            self.collect_expired()
            assert who == 0
            assert callers >= 4
        else:
            self.collect_expired()
            self.preparing.append(entry)
            self.admitted.append(entry)

    @precondition(lambda self: self.preparing)
    @rule(data=st.data())
    def put(self, data):
        entry = self.preparing.pop(data.draw(st.integers(0, len(self.preparing) - 1)))
        self.at.batcher.put(entry, IMAGE)
        self.waiting.append(entry)

    @precondition(lambda self: self.admitted)
    @rule(data=st.data())
    def withdraw(self, data):
        entry = self.admitted[data.draw(st.integers(0, len(self.admitted) - 1))]
        runs = entry in self.stepping and entry.state is EntryState.STEPPING
        open_ = entry in self.preparing or entry in self.waiting or runs
        assert self.at.batcher.withdraw(entry) is open_
        if open_:
            self.ends[entry] += 1
            if not runs:
                self.lost(entry)
                (self.preparing if entry in self.preparing else self.waiting).remove(entry)

    @precondition(lambda self: self.stepping)
    @rule(data=st.data(), done=st.booleans())
    def end_step(self, data, done):
        entry = self.stepping.pop(data.draw(st.integers(0, len(self.stepping) - 1)))
        wanted = entry.state is EntryState.STEPPING
        entry.steps = self.kept.setdefault(entry, Progress(rows=1, queue_s=0.0, discard=self.discarded.append))
        assert (self.at.batcher.finish if done else self.at.batcher.put_back)(entry) is wanted
        if not wanted:
            assert entry.image is None
        elif done:
            self.ends[entry] += 1
        else:
            self.waiting.append(entry)

    @rule(seconds=st.sampled_from([0.001, 0.3, 1.0]))
    def wait(self, seconds):
        self.at.clock.now += seconds

    @rule()
    def switch_device(self):
        if self.running:
            self.at.batcher.device_finished()
        else:
            self.at.batcher.device_started(2)
        self.running = not self.running

    @rule()
    def claim(self):
        batcher = self.at.batcher
        with batcher._changed:
            expired = batcher._sweep()
            batch = batcher._claim_due() or []
        batcher._deliver_expired(expired)
        self.collect_expired()
        assert len({entry.spec for entry in batch}) <= 1
        for entry in batch:
            on_time = entry.deadline is None or entry.deadline > self.at.clock.now
            # A stream's image that is begun is not late any more.
            assert on_time or (entry in self.kept and entry.source is not None)
            self.waiting.remove(entry)
            if entry.spec.in_steps:
                assert len(batch) == 1
                assert entry.state is EntryState.STEPPING
                assert not self.stepping
                # The one of its spec that is begun goes on.
                assert entry in self.kept or not any(other.spec == entry.spec for other in self.begun())
                self.stepping.append(entry)
            else:
                assert entry.state is EntryState.CLAIMED
                self.ends[entry] += 1
        # An idle device takes whatever there is, a step at a time.
        left = [entry for entry in self.waiting if not (self.stepping and entry.spec.in_steps)]
        assert batch or self.running or not left

    def begun(self) -> list[Entry]:
        return [entry for entry in self.waiting if entry.begun]

    def collect_expired(self) -> None:
        for entry, outcome in self.at.delivered:
            assert isinstance(outcome, DeadlineExpired)
            assert entry.state is EntryState.GONE
            self.lost(entry)
            self.waiting.remove(entry)
            self.ends[entry] += 1
        self.at.delivered.clear()

    def lost(self, entry: Entry) -> None:
        assert entry.steps is None
        if entry in self.kept:
            self.expected_discarded.append(self.kept[entry])

    @invariant()
    def balanced(self):
        assert len(self.at.batcher) == len(self.preparing) + len(self.waiting)
        waiting = self.at.batcher._round
        assert len(waiting) == len(self.waiting)
        assert set(waiting) == set(self.waiting)
        assert waiting._steps._begun == len(self.begun()) == len({entry.spec for entry in self.begun()})
        assert set(waiting._steps) == {entry for entry in self.waiting if entry.spec.in_steps}
        if not self.waiting:
            assert not waiting._buckets
            assert not waiting._steps._lines
        in_steps = [e for e in self.preparing + self.waiting if e.source is None and e.spec.in_steps]
        assert self.at.batcher._callers_in_steps == len(in_steps)
        assert self.at.batcher._stepping == len(self.stepping)
        assert self.discarded == self.expected_discarded
        assert all(count == 1 for count in self.ends.values())

    def teardown(self):
        for entry in list(self.preparing):
            self.at.batcher.withdraw(entry)
            self.ends[entry] += 1
        self.at.batcher.close()
        for entry in self.stepping:
            self.ends[entry] += self.at.batcher.finish(entry)
        while (batch := self.at.batcher.take()) is not None:
            self.ends.update(batch)
            if batch[0].spec.in_steps:
                assert self.at.batcher.finish(batch[0])
        self.ends.update(entry for entry, _ in self.at.delivered)
        assert set(self.ends) == set(self.admitted)
        assert all(count == 1 for count in self.ends.values())


Accounts.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, derandomize=True, deadline=None, database=None
)
TestAccounts = Accounts.TestCase
