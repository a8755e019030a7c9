"""Cores that a process may use: by its affinity, and by the limits of its control groups."""

import os

import pytest

from heatlens_server.core.cores import usable_cores

ALL = len(os.sched_getaffinity(0))


@pytest.fixture(autouse=True)
def _no_threads_asked_for(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("0::/", {"": "100000 100000"}, 1),
        ("0::/", {"": "50000 100000"}, 1),
        ("0::/", {"": "100001 100000"}, 2),
        ("0::/", {"": "6400000 100000"}, ALL),
        ("0::/", {"": "max 100000"}, ALL),
        ("0::/", {"": "what else"}, ALL),
        ("0::/", {}, ALL),
        ("8:cpu:/x\n0::/pods/one", {"pods/one": "max 100000", "pods": "100000 100000"}, 1),
        ("8:cpu:/x", {"": "100000 100000"}, ALL),
    ],
)
def test_a_limit_of_cpu_time_is_a_limit_of_cores(tmp_path, own, limits, expected):
    (tmp_path / "own").write_text(own + "\n")
    for folder, text in limits.items():
        (tmp_path / "groups" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / folder / "cpu.max").write_text(text + "\n")
    assert usable_cores(tmp_path / "groups", tmp_path / "own") == min(expected, ALL)


def test_a_system_without_control_groups_has_its_cores(tmp_path):
    assert usable_cores(tmp_path, tmp_path / "own") == ALL
    assert usable_cores() <= ALL


def test_affinity_counts():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(("wanted", "expected"), [("1", 1), ("64", ALL), ("0", ALL), ("", ALL), ("many", ALL)])
def test_the_number_of_threads_that_is_asked_for_counts(tmp_path, monkeypatch, wanted, expected):
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    assert usable_cores(tmp_path, tmp_path / "own") == expected
