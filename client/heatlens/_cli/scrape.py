"""What a server's /metrics say, and what happened between two scrapes."""

import http.client
import math
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

Labels = Mapping[str, str]

_MAX_BYTES = 64 * 2**20
"""What a scrape may be long, in bytes: thousands of models take a few MiB."""


def metrics_url(address: str) -> str:
    """Return "http://HOST:PORT/metrics" for "HOST:PORT"; a URL as it is, with /metrics where it has no path.

    Raises:
        ValueError: it is neither.
    """
    url = urllib.parse.urlsplit(address if "://" in address else f"http://{address}")
    if url.scheme not in {"http", "https"} or not url.hostname:
        raise ValueError(f"'{address}' is neither HOST:PORT nor a URL")
    return url._replace(path=url.path.rstrip("/") or "/metrics").geturl()


@dataclass(frozen=True)
class Scrape:
    """The samples of /metrics at one moment.

    Attributes:
        time_s: when, on the monotonic clock.
        samples: by name, the labels and the value of each.
    """

    time_s: float
    samples: Mapping[str, tuple[tuple[Labels, float], ...]]

    @classmethod
    def of(cls, text: str, *, time_s: float) -> Self:
        """Read Prometheus' text format.

        Raises:
            ValueError: `text` is something else.
        """
        # A third of what all other commands import.
        from prometheus_client.parser import text_string_to_metric_families  # noqa: PLC0415 - see above

        samples: defaultdict[str, list[tuple[Labels, float]]] = defaultdict(list)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples[sample.name].append((sample.labels, sample.value))
        return cls(time_s, {name: tuple(found) for name, found in samples.items()})

    def select(self, name: str, **labels: str) -> Iterator[tuple[Labels, float]]:
        """Yield the samples of a name whose labels have these values."""
        for has, value in self.samples.get(name, ()):
            if all(has.get(label) == wanted for label, wanted in labels.items()):
                yield has, value

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of such samples; 0 where there is none."""
        return math.fsum(value for _, value in self.select(name, **labels))

    def values(self, name: str, label: str, **labels: str) -> tuple[str, ...]:
        """Return the values that a label has in such samples, each once, in their order."""
        return tuple(dict.fromkeys(has[label] for has, _ in self.select(name, **labels) if label in has))


def scrape(url: str, *, timeout_s: float) -> Scrape:
    """Read /metrics.

    Raises:
        ConnectionError: nothing answers there, or what answers is no heatlens server's /metrics.
    """
    try:
        # Its scheme is http or https: `metrics_url`.
        with urllib.request.urlopen(url, timeout=timeout_s) as response:
            text = response.read(_MAX_BYTES).decode()
        found = Scrape.of(text, time_s=time.monotonic())
    except urllib.error.HTTPError as error:
        # It is an open answer as well.
        with error:
            raise ConnectionError(f"{url} answers with something else than metrics: {error}") from None
    except (ValueError, http.client.HTTPException) as error:
        raise ConnectionError(f"{url} answers with something else than metrics: {error}") from error
    except OSError as error:
        raise ConnectionError(f"{url}: {getattr(error, 'reason', None) or error}") from error
    if "heatlens_build_info" not in found.samples:
        raise ConnectionError(f"{url} has no metrics of heatlens")
    return found


@dataclass(frozen=True)
class Between:
    """What happened between two scrapes of one server. A counter that fell began anew: the server was started again."""

    before: Scrape
    after: Scrape

    @property
    def seconds(self) -> float:
        """How long it was."""
        return max(self.after.time_s - self.before.time_s, 1e-9)

    def count(self, name: str, **labels: str) -> float:
        """Return by how much counters grew."""
        before = {frozenset(has.items()): value for has, value in self.before.select(name, **labels)}
        grown = 0.0
        for has, value in self.after.select(name, **labels):
            earlier = before.get(frozenset(has.items()), 0.0)
            grown += value - earlier if value >= earlier else value
        return grown

    def rate(self, name: str, **labels: str) -> float:
        """Return by how much counters grew per second."""
        return self.count(name, **labels) / self.seconds

    def mean(self, name: str, **labels: str) -> float | None:
        """Return the mean of what a histogram was given meanwhile; None for nothing."""
        count = self.count(f"{name}_count", **labels)
        return self.count(f"{name}_sum", **labels) / count if count else None

    def quantile(self, share: float, name: str, **labels: str) -> float | None:
        """Return a quantile of what a histogram was given meanwhile; None for nothing.

        As Prometheus' histogram_quantile: linear inside a bucket; the last bound where it lies beyond all of them.
        """
        bounds = sorted(self.after.values(f"{name}_bucket", "le", **labels), key=float)
        counts = [self.count(f"{name}_bucket", le=bound, **labels) for bound in bounds]
        if not counts or not counts[-1]:
            return None
        rank = share * counts[-1]
        below_s, below = 0.0, 0.0
        for bound, count in zip(map(float, bounds), counts, strict=True):
            if count >= rank:
                if math.isinf(bound):
                    return below_s
                return below_s + (bound - below_s) * (rank - below) / max(count - below, 1e-9)
            below_s, below = bound, count
        return below_s
