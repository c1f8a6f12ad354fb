"""The run as text: rates, the bottleneck, failures grouped by reason."""

import pytest

from multisa.runtime.report.summary import (
    MAX_GROUPS,
    OTHER,
    RunFigures,
    StageTime,
    busy_shares,
    describe_duration,
    describe_limit,
    describe_run,
    figures_from_run,
    general_reason,
    group_failures,
)


def figures(*stages: tuple[str, float, int], cores: int = 0, seconds: float = 100.0) -> RunFigures:
    return RunFigures("label", 50, 0, seconds, tuple(StageTime(*stage) for stage in stages), cores=cores)


def test_busy_share_is_of_the_time_of_all_workers() -> None:
    assert busy_shares(figures(("decode", 30, 1), ("cam", 180, 2))) == {"cam": 0.9, "decode": 0.3}
    assert busy_shares(figures(("decode", 30, 1), seconds=0)) == {}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            figures(("cam", 180, 2), ("decode", 10, 1), cores=8),
            "the bottleneck is cam: its 2 workers were busy 90% of the time; more workers",
        ),
        (
            figures(("cam", 60, 1), ("crf", 59, 1), ("decode", 55, 1), cores=2),
            "the bottleneck is the CPU, mostly in cam",
        ),
        (figures(("cam", 40, 1), ("decode", 41, 1), cores=4), "no stage is the bottleneck: decode is the busiest"),
        (figures(), ""),
    ],
)
def test_limit(given: RunFigures, expected: str) -> None:
    assert describe_limit(given).startswith(expected)
    assert bool(describe_limit(given)) == bool(expected)


def test_text_of_a_run() -> None:
    text = describe_run(
        RunFigures(
            command="segment",
            done=980,
            failed=20,
            seconds=250.0,
            stages=(StageTime("segmenter", 240.0), StageTime("decode", 25.0)),
            kept=100,
            skipped=3,
            cores=4,
            reasons={"the file is empty": 1, "cannot be decoded": 19},
        )
    )
    assert text.splitlines() == [
        "980 images in 4 min 10 s (3.92/s), 20 failed, 100 done earlier, 3 skipped",
        "busy: segmenter 96%, decode 10%",
        "the bottleneck is segmenter: its worker was busy 96% of the time; more workers or a faster backend would help",
        "failed, 19 images: cannot be decoded",
        "failed, 1 image: the file is empty",
    ]


def test_many_reasons_and_no_time() -> None:
    text = describe_run(RunFigures("label", 0, 8, 0.0, reasons={f"reason {c}": 1 for c in "abcdefgh"}))
    assert text.startswith("0 images in 0.0 s (0.00/s), 8 failed\n")
    assert text.endswith("failed, 3 images: 3 other reasons")


def test_figures_of_a_run_record() -> None:
    run = {"command": "label", "images": 3, "failures": 1, "seconds": 2.0, "workers": 2}
    stages = {"stage_seconds": {"cam": 3.0, "crf": 1.0}, "stage_workers": {"crf": 1}}
    found = figures_from_run(run | stages | {"skipped": 2_500, "skipped_entries": ["a"]})  # it names some
    assert found.stages == (StageTime("cam", 3.0, 2), StageTime("crf", 1.0, 1))
    assert (found.done, found.failed, found.skipped) == (3, 1, 2_500)
    assert describe_run(figures_from_run({})).startswith("0 images")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.84, "0.8 s"), (59.99, "60.0 s"), (250, "4 min 10 s"), (11100, "3 h 05 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert describe_duration(seconds) == text


@pytest.mark.parametrize(
    ("reason", "image", "expected"),
    [
        ("a/7.jpg: the file is empty", "a/7.jpg", "the file is empty"),
        ("got 9000x9000 = 81,000,000 pixels", "x", "got …x… = … pixels"),
        ("cannot read 'tmp/q 3.jpg' at byte 17", "", "cannot read … at byte …"),
        ("no member a/7.jpg in shard 3", "a/7.jpg", "no member … in shard …"),
    ],
)
def test_reasons_without_what_is_of_one_image(reason: str, image: str, expected: str) -> None:
    assert general_reason(reason, image) == expected


def test_failures_of_a_kind_are_one_group() -> None:
    failures = [{"image": f"{i}.jpg", "reason": f"cut at byte {i}"} for i in range(30)]
    failures += [{"image": "e.jpg", "reason": "the file is empty"}]
    groups = group_failures(iter(failures), ids=3)
    assert [(reason, group.count) for reason, group in groups.items()] == [
        ("cut at byte …", 30),
        ("the file is empty", 1),
    ]
    assert groups["cut at byte …"].ids == ["0.jpg", "1.jpg", "2.jpg"]


def test_reasons_that_never_end_are_bounded() -> None:
    letters = ({"image": "a", "reason": "x" * (i % 299) + "y" * (i // 299)} for i in range(50_000))
    groups = group_failures(letters, ids=2)
    assert len(groups) == MAX_GROUPS + 1 and next(iter(groups)) == OTHER
    assert sum(group.count for group in groups.values()) == 50_000
