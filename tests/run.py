"""All tests in two runs of pytest: two at a time, then one at a time those that measure. `make test` runs this.

Both runs always take place. The closing line adds them up; the exit status is that of the first that fails.
Arguments are passed on to both.
"""

import datetime
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest

# Files stay together for their fixtures, and in their order: the last ones are short, so that both workers end at once.
PARALLEL = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "-m", "not serial"]
SERIAL = ["-m", "serial"]


class Outcomes:
    """A plugin that counts how the tests of all runs ended."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def pytest_ignore_collect(self, collection_path: Path, config: pytest.Config) -> bool | None:
        """The second run reads few files: importing all of them takes as long as some of its tests."""
        if collection_path.suffix == ".py" and config.option.markexpr == SERIAL[-1]:
            return SERIAL[-1] not in collection_path.read_text() or None
        return None

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        self.counts.update(
            {name: len(terminalreporter.getreports(name)) for name in ("failed", "passed", "skipped", "error")}
        )


def main(arguments: list[str]) -> int:
    """Run all tests and print the sum."""
    start_s = time.monotonic()
    outcomes, statuses = Outcomes(), []
    with tempfile.TemporaryDirectory(prefix="heatlens-tests-") as cache:
        os.environ["TESTS_CACHE_HOME"] = cache  # what one run exports the other need not
        for selection in (PARALLEL, SERIAL):
            statuses.append(int(pytest.main([*selection, *arguments], plugins=[outcomes])))
            if statuses[-1] == pytest.ExitCode.INTERRUPTED:
                break
    said = ", ".join(f"{count} {name}" for name, count in outcomes.counts.items() if count) or "no tests ran"
    took_s = time.monotonic() - start_s
    print("\nboth runs together:")
    print(f" {said} in {took_s:.2f}s ({datetime.timedelta(seconds=round(took_s))}) ".center(80, "="))
    # Of a selection, all may be of one kind.
    fine = {0, pytest.ExitCode.NO_TESTS_COLLECTED} if arguments else {0}
    return next((status for status in statuses if status not in fine), min(statuses))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
