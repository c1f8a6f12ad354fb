"""CPUs of a process: its affinity, and the quotas of a container. The name of the processor."""

import os
from pathlib import Path

import pytest

from multisa.runtime import system
from multisa.runtime.doctor import examine
from multisa.runtime.jobs.spec import RunOptions
from multisa.runtime.system import processor_features, processor_name, usable_cpus


@pytest.fixture
def eight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight processors, and a tree of cgroups in which nothing is limited."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(system, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(system, "_MEMBERSHIP", tmp_path / "membership")
    (tmp_path / "cgroup/pod/box").mkdir(parents=True)
    (tmp_path / "membership").write_text("4:memory:/pod\n0::/pod/box\n")
    return tmp_path / "cgroup"


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 8),
        ({"pod/box": "max 100000"}, 8),
        ({"pod/box": "200000 100000"}, 2),
        ({"pod/box": "150000 100000"}, 2),
        ({"pod/box": "10000 100000"}, 1),
        ({"pod": "300000 100000", "pod/box": "max 100000"}, 3),
        ({".": "400000 100000", "pod/box": "500000 100000"}, 4),
        ({"pod/box": "6400000 100000"}, 8),
        ({"pod/box": "garbage"}, 8),
        ({"pod/box": "100000 0"}, 8),
    ],
)
def test_usable_cpus(eight: Path, limits: dict[str, str], expected: int) -> None:
    for group, text in limits.items():
        (eight / group / "cpu.max").write_text(f"{text}\n")
    assert usable_cpus() == expected


def test_without_cgroups(eight: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "_MEMBERSHIP", eight / "absent")
    assert usable_cpus() == 8
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cpus() == 64


def test_who_asks(eight: Path, tmp_path: Path) -> None:
    (eight / "pod/box/cpu.max").write_text("200000 100000\n")
    assert RunOptions().workers == 2
    (processor,) = (f for f in examine(tmp_path / "none").machine if f.name == "processor")
    assert ", 2 cores to use of 64, " in processor.text


def test_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(system, "_CPU_INFO", info)
    assert processor_name() and processor_features() == frozenset()  # not Linux
    info.write_text("processor\t: 0\nmodel name\t: Fast CPU 9\nflags\t\t: fpu avx2 fma\n\nprocessor\t: 1\n")
    assert processor_name() == "Fast CPU 9"
    assert processor_features() == {"fpu", "avx2", "fma"}
