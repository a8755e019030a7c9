"""Every admitted entry ends once: a random walk over everything that can happen to a batcher."""

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from batching import ABLATION, IMAGE, LAYER, OTHER, STEPPED, Bench
from heatlens_server.core.errors import DeadlineExpired, QueueFull
from heatlens_server.scheduling.entry import Entry, EntryState, Progress, Source


class Accounts(RuleBasedStateMachine):
    """Every admitted entry is claimed, done in steps, expired or withdrawn, exactly once, whatever happens in between.

    And what is kept between two steps is given to be freed exactly when its device would not learn of the end.
    """

    device_count = 1

    def __init__(self) -> None:
        super().__init__()
        self.at = Bench(max_batch_size=3, max_queue_length=4, device_count=self.device_count)
        self.sources: list[Source | None] = [None, Source(), Source()]
        self.decoding: list[Entry] = []
        self.waiting: list[Entry] = []
        self.ahead: list[list[Entry]] = []
        self.running: dict[int, list[Entry]] = {}
        self.kept: dict[Entry, Progress] = {}
        self.expected_discarded: list[Progress] = []
        self.discarded: list[Progress] = []
        self.ends: Counter[Entry] = Counter()
        self.admitted: list[Entry] = []

    @rule(
        who=st.integers(0, 2),
        spec=st.sampled_from([LAYER, OTHER, STEPPED, ABLATION]),
        timeout_s=st.sampled_from([None, 0.5, 2.0]),
    )
    def admit(self, who, spec, timeout_s):
        callers = sum(entry.source is None for entry in self.decoding + self.waiting)
        try:
            entry = self.at.admit(spec, timeout_s, self.sources[who])
        except QueueFull:
            self.collect_expired()
            assert who == 0
            assert callers >= 4
        else:
            self.collect_expired()
            self.decoding.append(entry)
            self.admitted.append(entry)

    @precondition(lambda self: self.decoding)
    @rule(data=st.data())
    def put(self, data):
        entry = self.decoding.pop(data.draw(st.integers(0, len(self.decoding) - 1)))
        self.at.batcher.put(entry, IMAGE)
        self.waiting.append(entry)

    @precondition(lambda self: self.admitted)
    @rule(data=st.data())
    def withdraw(self, data):
        entry = self.admitted[data.draw(st.integers(0, len(self.admitted) - 1))]
        runs = entry in self.stepping() and entry.state is EntryState.STEPPING
        open_ = entry in self.decoding or entry in self.waiting or runs
        assert self.at.batcher.withdraw(entry) is open_
        if open_:
            self.ends[entry] += 1
            if not runs:
                self.lost(entry)
                (self.decoding if entry in self.decoding else self.waiting).remove(entry)

    @rule(seconds=st.sampled_from([0.001, 0.3, 1.0]))
    def wait(self, seconds):
        self.at.clock.now += seconds

    @rule()
    def claim(self):
        batch = self.at.due() or []
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
                assert entry.device not in {other.device for other in self.stepping()}
                # The one of its spec that this device has begun goes on.
                assert entry in self.kept or (entry.spec, entry.device) not in self.begun()
            else:
                assert entry.state is EntryState.CLAIMED
                assert entry.device is None
                self.ends[entry] += 1
        if batch:
            self.ahead.append(batch)
            assert len(self.ahead) <= self.device_count
        elif not self.ahead and not self.running:
            # Idle devices take whatever there is.
            assert not self.waiting

    @precondition(lambda self: self.ahead)
    @rule(device=st.integers(0, 1))
    def begin(self, device):
        batch = self.ahead[0]
        device = device % self.device_count if batch[0].device is None else batch[0].device
        if device in self.running:
            return
        self.ahead.pop(0)
        gone = batch[0].state is EntryState.GONE
        assert self.at.batcher.begin(device, batch) is not gone
        if not gone:
            self.running[device] = batch

    @precondition(lambda self: self.running)
    @rule(data=st.data(), done=st.booleans())
    def end(self, data, done):
        device = data.draw(st.sampled_from(sorted(self.running)))
        entry = self.running.pop(device)[0]
        if not entry.spec.in_steps:
            self.at.batcher.end_batch(device)
            return
        wanted = entry.state is EntryState.STEPPING
        entry.steps = self.kept.setdefault(entry, Progress(rows=1, queue_s=0.0, discard=self.discarded.append))
        assert (self.at.batcher.finish if done else self.at.batcher.put_back)(device, entry) is wanted
        if not wanted:
            assert entry.image is None
        elif done:
            self.ends[entry] += 1
        else:
            self.waiting.append(entry)

    def stepping(self) -> list[Entry]:
        return [batch[0] for batch in [*self.ahead, *self.running.values()] if batch[0].spec.in_steps]

    def begun(self) -> list[tuple[object, int | None]]:
        return [(entry.spec, entry.device) for entry in self.waiting if entry.begun]

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
        assert len(self.at.batcher) == len(self.decoding) + len(self.waiting)
        assert self.at.batcher.waiting == len(self.waiting)
        assert len(self.begun()) == len(set(self.begun()))
        assert self.discarded == self.expected_discarded
        assert all(count == 1 for count in self.ends.values())

    def teardown(self):
        for entry in list(self.decoding):
            self.at.batcher.withdraw(entry)
            self.ends[entry] += 1
        self.at.batcher.close()
        while self.running or self.ahead or len(self.at.batcher):
            for device, (entry, *_) in self.running.items():
                if not entry.spec.in_steps:
                    self.at.batcher.end_batch(device)
                elif self.at.batcher.finish(device, entry):
                    self.ends[entry] += 1
            self.running.clear()
            for batch in sorted(self.ahead, key=lambda batch: batch[0].device is None):
                device = batch[0].device
                device = min(set(range(2)) - self.running.keys()) if device is None else device
                if self.at.batcher.begin(device, batch):
                    self.running[device] = batch
            self.ahead.clear()
            batch = self.at.due()
            if batch:
                if not batch[0].spec.in_steps:
                    self.ends.update(batch)
                self.ahead.append(batch)
        assert self.at.batcher.take() is None
        self.ends.update(entry for entry, _ in self.at.delivered)
        assert set(self.ends) == set(self.admitted)
        assert all(count == 1 for count in self.ends.values())


class AccountsOfTwoDevices(Accounts):
    device_count = 2


SETTINGS = settings(max_examples=60, stateful_step_count=40, derandomize=True, deadline=None, database=None)
Accounts.TestCase.settings = AccountsOfTwoDevices.TestCase.settings = SETTINGS
TestAccounts = Accounts.TestCase
TestAccountsOfTwoDevices = AccountsOfTwoDevices.TestCase
