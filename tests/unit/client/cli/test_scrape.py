"""What /metrics say between two scrapes."""

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from heatlens._cli.scrape import Between, Scrape, metrics_url


class Page:
    """A counter and a histogram, and what /metrics would say of them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.calls = Counter("calls", "Calls.", ["model", "code"], registry=self.registry)
        self.seconds = Histogram("took_seconds", "How long.", ["model"], buckets=(1, 2, 4), registry=self.registry)

    def at(self, time_s: float) -> Scrape:
        return Scrape.of(generate_latest(self.registry).decode(), time_s=time_s)


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("localhost:9090", "http://localhost:9090/metrics"),
        ("[::1]:9090", "http://[::1]:9090/metrics"),
        ("https://host/", "https://host/metrics"),
        ("http://host:1/behind/a/proxy", "http://host:1/behind/a/proxy"),
    ],
)
def test_an_address_is_made_a_url(given, url):
    assert metrics_url(given) == url


@pytest.mark.parametrize("given", ["", "file:///etc/passwd", "ftp://host", "http://"])
def test_nothing_else_is_opened(given):
    with pytest.raises(ValueError, match="neither HOST:PORT nor a URL"):
        metrics_url(given)


def test_counters_grow_by_labels_and_what_is_new_counts_whole():
    page = Page()
    page.calls.labels("a", "OK").inc(5)
    before = page.at(10.0)
    page.calls.labels("a", "OK").inc(6)
    page.calls.labels("b", "OK").inc(2)
    seen = Between(before, page.at(12.0))
    assert seen.seconds == 2
    assert seen.count("calls_total") == 8
    assert seen.rate("calls_total", model="a") == 3
    assert seen.after.total("calls_total", code="OK") == 13
    assert seen.after.values("calls_total", "model") == ("a", "b")
    assert seen.count("unknown_total") == 0


def test_a_counter_that_fell_began_anew():
    before, after = Page(), Page()
    before.calls.labels("a", "OK").inc(100)
    after.calls.labels("a", "OK").inc(3)
    assert Between(before.at(0.0), after.at(1.0)).count("calls_total") == 3


def test_quantiles_and_means_are_of_the_interval_alone():
    page = Page()
    for _ in range(100):
        page.seconds.labels("a").observe(3.9)
    before = page.at(0.0)
    for value in (0.5, 0.5, 1.5, 1.5):
        page.seconds.labels("a").observe(value)
    seen = Between(before, page.at(1.0))
    assert seen.mean("took_seconds", model="a") == 1.0
    assert seen.quantile(0.5, "took_seconds", model="a") == 1.0
    assert seen.quantile(0.25, "took_seconds", model="a") == 0.5
    assert seen.quantile(1.0, "took_seconds", model="a") == 2.0
    assert seen.quantile(0.5, "took_seconds", model="b") is None
    assert seen.mean("took_seconds", model="b") is None


def test_a_quantile_beyond_the_last_bound_is_the_last_bound():
    page = Page()
    before = page.at(0.0)
    page.seconds.labels("a").observe(99.0)
    assert Between(before, page.at(1.0)).quantile(0.99, "took_seconds", model="a") == 4
