"""All tests in two runs of pytest: two at a time, then one at a time those that measure. `make test` runs this.

Both runs always take place. The closing line is the sum of theirs, the exit status is that of the first that fails.
Arguments are passed on to both.
"""

import contextlib
import datetime
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

# Files stay together for their fixtures, and in their order: the last ones are short, so that both workers end at once.
SIDE_BY_SIDE = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "-m", "not serial")
SERIAL = ("-m", "serial")
NO_TESTS = 5
OUTCOMES = ("failed", "passed", "skipped", "errors")


def run(selection: tuple[str, ...], arguments: list[str], report: Path) -> int:
    """One run of pytest: its exit status. Its report is written as JUnit XML."""
    command = [sys.executable, "-m", "pytest", *selection, f"--junit-xml={report}", *arguments]
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            # It was told too, and has servers to stop.
            with contextlib.suppress(KeyboardInterrupt):
                process.wait()
            raise


def outcomes(report: Path) -> Counter[str]:
    """How many tests failed, passed, were skipped, and had errors elsewhere; none if pytest did not get that far."""
    if not report.exists():
        return Counter()
    (suite,) = ElementTree.parse(report).getroot()
    failed, skipped, errors = (int(suite.get(name)) for name in ("failures", "skipped", "errors"))
    passed = int(suite.get("tests")) - failed - skipped - errors
    return Counter(dict(zip(OUTCOMES, (failed, passed, skipped, errors), strict=True)))


def main(arguments: list[str]) -> int:
    """Run all and say what came out."""
    start_s = time.monotonic()
    statuses: list[int] = []
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="heatlens-tests-") as folder:
        # What one run exports the other need not.
        os.environ["TESTS_CACHE_HOME"] = str(Path(folder, "cache"))
        for index, selection in enumerate((SIDE_BY_SIDE, SERIAL)):
            report = Path(folder, f"{index}.xml")
            statuses.append(run(selection, arguments, report))
            total += outcomes(report)
    said = ", ".join(f"{total[name]} {name}" for name in OUTCOMES if total[name]) or "no tests ran"
    took_s = time.monotonic() - start_s
    print("\nboth runs together:")
    print(f" {said} in {took_s:.2f}s ({datetime.timedelta(seconds=round(took_s))}) ".center(80, "="))
    # Of a selection, all may be of one kind.
    fine = {0, NO_TESTS} if arguments else {0}
    return next((status for status in statuses if status not in fine), min(statuses))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
