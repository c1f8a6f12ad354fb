"""Two reports of made-up figures compared: what counts as worse, and what is noise."""

from collections.abc import Callable
from copy import deepcopy

import pytest
from made_up import EAGER, OURS, Bench, compared, found, setter, turns

from multisa.benchmarks.report import compare_benches
from multisa.benchmarks.report.figures import figures, spread, spread_of_ratio
from multisa.benchmarks.report.judge import judge
from multisa.runtime.errors import UsageError


def test_a_report_is_no_worse_than_itself(made_up: Bench) -> None:
    comparison = compare_benches(made_up, made_up)
    assert comparison.regressions == comparison.improvements == ()
    assert comparison.unmatched == comparison.notes == ()
    assert {change.stage for change in comparison.changes} == {"segment", "label", "kernels"}
    assert len(comparison.changes) == 5 * 12 + 3 * 5 + 5
    assert comparison.text().endswith("0 worse, 0 better, 80 as before")


@pytest.mark.parametrize(
    ("change", "worse"),
    [
        (setter("segment", OURS, "latency_ms", "p50", to=44.5), ("segment", "latency p50", "slower")),
        (setter("segment", OURS, "latency_ms", "p50", to=43.5), None),
        (setter("segment", OURS, "images_per_second", to=28.0), ("segment", "end to end", "slower")),
        (setter("segment", OURS, "startup_seconds", to=0.61), ("segment", "start-up", "slower")),
        (setter("segment", OURS, "startup_seconds", to=0.59), None),
        (setter("segment", OURS, "peak_mib", "host", to=377.0), ("segment", "peak memory", "more")),
        (setter("segment", OURS, "peak_mib", "host", to=375.0), None),  # 1.2 times and 16 MiB
        (setter("segment", OURS, "miou", to=61.12), ("segment", "mIoU", "lower")),
        (setter("segment", OURS, "miou", to=61.13), None),
        (setter("segment", EAGER, "miou", to=61.0), ("segment", "mIoU", "lower")),
        (setter("segment", OURS, "label_agreement", to=0.9987), ("segment", "labels alike", "lower")),
        (setter("segment", OURS, "label_agreement", to=0.9988), None),
        (
            setter("segment", OURS, "batches", 2, "images_per_second", to=15.0),
            ("segment", "over batches", "slower"),
        ),
        (setter("segment", OURS, "batches", 2, "images_per_second", to=25.0), None),  # one point of four
        (
            setter("segment", OURS, "loop", "images_per_second", to=[15.0]),
            ("segment", "plain loop", "slower"),
        ),
        (setter("segment", OURS, "latency_ms", "p90", to=58.0), ("segment", "latency p90", "slower")),
        (setter("segment", OURS, "latency_ms", "p90", to=57.0), None),  # 1.19 times
        (setter("segment", OURS, "model_bytes", to=17_900_000), ("segment", "model size", "more")),
        (setter("segment", OURS, "model_bytes", to=17_850_000), None),  # 1.05 times
        (turns(3.0, 5.0, 9.5), ("label", "end to end", "slower")),
        (turns(3.2, 5.1, 10.5), None),
        (setter("kernels", 0, "median_ms", to=3.0), ("kernels", "median", "slower")),
        # Not ours: nobody's regression here.
        (setter("segment", EAGER, "model_bytes", to=30_000_000), None),
        (setter("segment", EAGER, "peak_mib", "host", to=3000.0), None),
        (setter("segment", EAGER + 1, "latency_ms", "p50", to=200.0), None),
        (setter("kernels", 4, "median_ms", to=900.0), None),
        # On one machine times are compared, and ratios say the same again.
        (setter("label", 1, "default_times_as_fast", to=3.0), None),
    ],
)
def test_what_is_worse(
    made_up: Bench, change: Callable[[Bench], None], worse: tuple[str, str, str] | None
) -> None:
    assert found(compared(made_up, change)) == ([] if worse is None else [worse])
    new = deepcopy(made_up)
    change(new)
    back = compare_benches(made_up, new)  # what was worse is better the other way round
    if worse is not None:
        (better,) = back.improvements
        assert (better.stage, better.figure) == worse[:2] and not back.regressions


def test_turns_of_other_photographs_are_compared_one_by_one(made_up: Bench) -> None:
    """Their medians are as then, and their scatter is large: of photographs, not of noise."""
    comparison = compared(made_up, turns(2.8, 5.56, 8.0))  # 0.84, 1.00 and 0.76 times as fast
    (worse,) = comparison.regressions
    assert (worse.row, worse.figure) == ("multisa label, ONNX Runtime, CPU fp32", "end to end")
    assert worse.ratio == pytest.approx(0.84, abs=0.002) and worse.noise == pytest.approx(0.1)
    assert str(worse).endswith("5.56 images/s then, 5.56 images/s now (0.84× turn by turn): slower")
    made_up["label"][0]["end_to_end"]["turns"] = None  # repeats of the same photographs: noise
    assert not compared(made_up, turns(2.8, 5.56, 8.0)).regressions


def test_ratios_scatter_as_the_baseline_does() -> None:
    steady, shaky = [10.0, 10.0, 10.0], [8.0, 10.0, 12.0]
    assert spread_of_ratio(steady, shaky) == pytest.approx(spread([10 / 8, 1.0, 10 / 12]))
    assert spread_of_ratio(shaky, shaky) == 0.0  # slowed down together, in turn
    assert spread_of_ratio(steady, shaky[:2] * 2) == pytest.approx(spread(shaky[:2] * 2))
    row = {"engine": "openvino", "latency_ms": {"p50": 10.0, "repeats": steady}, "times_baseline": 1.0}
    beside = {"engine": "pytorch-eager", "latency_ms": {"p50": 10.0, "repeats": shaky}}
    assert figures("segment", row)["times baseline"].spread == 0.0
    assert figures("segment", row, beside)["times baseline"].spread > 0.1
    kernel = {"way": "scipy", "median_ms": 10.0, "min_ms": 9.0, "times_ours": 5.0}
    ours = {"way": "multisa", "median_ms": 2.0, "min_ms": 1.6}
    assert figures("kernels", kernel, ours)["ours times as fast"].spread == pytest.approx(0.3)


def test_noise_is_the_tolerance_or_the_scatter(made_up: Bench) -> None:
    change = setter("segment", OURS, "latency_ms", "p50", to=46.0)  # 1.15 times
    assert len(compared(made_up, change).regressions) == 1
    assert not compared(made_up, change, tolerance=0.2).regressions
    made_up["segment"][OURS]["latency_ms"]["repeats"] = [
        36.0,
        36.0,
        40.0,
        44.0,
        44.0,
    ]  # 0.1 each way, in both
    comparison = compared(made_up, change)
    assert not comparison.regressions
    (latency,) = (
        c for c in comparison.changes if (c.row, c.figure) == ("ONNX Runtime, CPU fp32", "latency p50")
    )
    assert latency.noise == pytest.approx(0.2) and latency.ratio == pytest.approx(1.15)
    made_up["kernels"][0]["min_ms"] = 1.6  # of kernels: from the least to the median
    assert not compared(made_up, setter("kernels", 0, "median_ms", to=2.4)).regressions


def test_spread_is_not_made_by_one_interruption() -> None:
    assert spread([10.0, 10.0]) == 0.0  # too few to tell
    assert spread([10.0, 10.0, 10.0, 10.0, 90.0]) == 0.0
    assert spread([9.0, 9.0, 10.0, 11.0, 11.0]) == pytest.approx(0.1)


@pytest.mark.parametrize("path", [("data", "digest"), ("bundle", "sha256")])
def test_accuracy_is_compared_for_one_bundle_and_data(made_up: Bench, path: tuple[str, str]) -> None:
    def change(bench: Bench) -> None:
        bench["environment"][path[0]][path[1]] = "other"
        bench["segment"][OURS]["miou"] = 10.0
        bench["label"][0]["label_agreement"] = 0.1
        bench["kernels"][0]["median_ms"] = 4.0  # which know neither

    comparison = compared(made_up, change)
    assert found(comparison) == [("kernels", "median", "slower")]
    assert "segment, label: mIoU and agreement of labels are not compared either." in comparison.notes
    assert not any(note.startswith("kernels") for note in comparison.notes)


def test_the_text_is_a_table_that_ends_with_what_is_worse(made_up: Bench) -> None:
    def change(bench: Bench) -> None:
        setter("segment", OURS, "latency_ms", "p50", to=50.0)(bench)
        setter("segment", OURS, "miou", to=61.0)(bench)

    lines = compared(made_up, change).text().splitlines()
    assert lines[0].split() == ["compared", "figure", "then", "now", "unit", "change", "noise", "verdict"]
    (latency,) = (line for line in lines if "WORSE: slower" in line)
    assert latency.split()[5:] == ["latency", "p50", "40.0", "50.0", "ms", "1.25×", "10%", "WORSE:", "slower"]
    assert lines[-3:] == [
        "worse: segment: ONNX Runtime, CPU fp32, latency p50: 40.0 ms then, 50.0 ms now: slower",
        "worse: segment: ONNX Runtime, CPU fp32, mIoU: 61.230 % then, 61.000 % now: lower",
        "2 worse, 0 better, 78 as before",
    ]


def test_an_old_report_from_anybody_writes_no_control_characters(made_up: Bench) -> None:
    old = deepcopy(made_up)
    old["segment"][OURS]["engine"] = old["environment"]["processor"] = "\x1b[2J\nroot"
    text = compare_benches(made_up, old).text()
    assert "\x1b" not in text and "[2J root" in text


@pytest.mark.parametrize("tolerance", [-0.1, 11.0, float("nan")])
def test_tolerances_that_are_no_shares(made_up: Bench, tolerance: float) -> None:
    with pytest.raises(UsageError, match=r"tolerance: got .*, expected a share from 0 to 10"):
        compare_benches(made_up, made_up, tolerance=tolerance)


def test_both_reports_are_checked(made_up: Bench) -> None:
    broken = {**made_up, "segment": [1, {"notes": [2]}], "label": {}}
    for pair in ((made_up, {"schema_version": 1}), ({}, made_up), (broken, made_up), ([], made_up)):
        with pytest.raises(UsageError, match="expected"):
            compare_benches(*pair)


@pytest.mark.parametrize(
    ("kind", "old", "new", "drift", "verdict"),
    [
        ("time", 10.0, 12.0, 1.0, "slower"),
        ("rate", 10.0, 8.0, 1.0, "slower"),
        ("ratio", 10.0, 8.0, 1.0, "slower"),
        ("time", 10.0, 12.0, 1.2, "slower, but so are others"),
        ("time", 10.0, 8.0, 0.8, "faster, but so are others"),
        ("time", 10.0, 10.9, 1.0, "same"),
        ("rate", 10.0, 12.0, 1.0, "faster"),
    ],
)
def test_judging_a_time(kind: str, old: float, new: float, drift: float, verdict: str) -> None:
    assert judge(kind, old, new, 0.1, drift)[1] == verdict


def test_many_rows_take_no_square_of_their_number(made_up: Bench) -> None:
    """As many as a file may have; with a search of all rows for each figure it would take minutes."""
    made_up["kernels"] = [
        {"kernel": "walk", "way": way, "size": str(size), "threads": 1, "median_ms": 1.0, "min_ms": 1.0}
        for size in range(250)
        for way in ("multisa", "other")
    ]
    assert len(compare_benches(made_up, made_up).changes) == 75 + 500
