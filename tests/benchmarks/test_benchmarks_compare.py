"""Two reports of made-up figures compared: what counts as worse, what is noise, what is the machine."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest

from multisa.benchmarks.report import Comparison, compare_benches
from multisa.benchmarks.report.figures import spread
from multisa.benchmarks.report.judge import judge
from multisa.runtime.errors import UsageError

Bench = dict[str, Any]
OURS, INT8, OPENVINO, EAGER = 0, 1, 2, 3  # rows of segment


def compared(old: Bench, change: Callable[[Bench], object], **more: Any) -> Comparison:
    new = deepcopy(old)
    change(new)
    return compare_benches(new, old, **more)


def found(comparison: Comparison) -> list[tuple[str, str, str]]:
    """(stage, figure, verdict) of what is worse."""
    return [(change.stage, change.figure, change.verdict) for change in comparison.regressions]


def slow(bench: Bench, factor: float, *rows: int) -> None:
    """Rows of segment take `factor` times as long, in all their times."""
    for index in rows:
        row = bench["segment"][index]
        latency, whole = row["latency_ms"], row["end_to_end"]
        latency["p50"] *= factor
        latency["repeats"] = [one * factor for one in latency["repeats"]]
        row["images_per_second"] /= factor
        whole["images_per_second"] = [one / factor for one in whole["images_per_second"]]
        for point in (*row["batches"], *row["cores"]):
            point["images_per_second"] /= factor
        for point in row["sizes"]:
            point["latency_ms"] *= factor


def setter(*path: str | int, to: object) -> Callable[[Bench], None]:
    def change(bench: Bench) -> None:
        inside: Any = bench
        for key in path[:-1]:
            inside = inside[key]
        inside[path[-1]] = to

    return change


def test_a_report_is_no_worse_than_itself(made_up: Bench) -> None:
    comparison = compare_benches(made_up, made_up)
    assert comparison.regressions == comparison.improvements == ()
    assert comparison.unmatched == comparison.notes == ()
    assert {change.stage for change in comparison.changes} == {"segment", "label", "kernels"}
    assert len(comparison.changes) == 5 * 9 + 3 * 5 + 5
    assert comparison.text().endswith("0 worse, 0 better, 65 as before")


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
        (setter("label", 0, "images_per_second", to=4.9), ("label", "end to end", "slower")),
        (setter("kernels", 0, "median_ms", to=3.0), ("kernels", "median", "slower")),
        # Not ours: nobody's regression here.
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


def test_a_slower_machine_is_no_regression(made_up: Bench) -> None:
    everything = compared(made_up, lambda bench: slow(bench, 1.5, OURS, INT8, OPENVINO, EAGER, EAGER + 1))
    assert not everything.regressions and not everything.improvements
    assert any("so are others" in change.verdict for change in everything.changes)
    (note,) = everything.notes
    assert "PyTorch eager fp32 takes 1.50 times as long as then" in note
    both = compared(made_up, lambda bench: (slow(bench, 1.5, EAGER), slow(bench, 2.4, OURS)))
    assert {(stage, verdict) for stage, _, verdict in found(both)} == {("segment", "slower")}
    # Faster by itself than then, if less so than the others: not held against us.
    faster = compared(made_up, lambda bench: (slow(bench, 0.5, EAGER), slow(bench, 0.85, OURS)))
    assert not faster.regressions and not faster.improvements


def test_kernels_have_yardsticks_of_their_own(made_up: Bench) -> None:
    def slower_crf(bench: Bench) -> None:
        for index in (3, 4):
            bench["kernels"][index]["median_ms"] *= 1.5

    assert not compared(made_up, slower_crf).regressions
    comparison = compared(
        made_up, lambda bench: (slower_crf(bench), setter("kernels", 0, "median_ms", to=3.0)(bench))
    )
    (worse,) = comparison.regressions
    assert worse.row == "random walk: multisa 64x64x4"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("processor", "Another", "processor not as then (Made-up Processor 9000 then, Another now)"),
        ("cores", 64, "cores not as then (2 then, 64 now)"),
        ("quick", True, "quick not as then (no then, yes now)"),
    ],
)
def test_another_machine_is_held_to_ratios(made_up: Bench, key: str, value: object, words: str) -> None:
    def change(bench: Bench) -> None:
        bench["environment"][key] = value
        slow(bench, 3, OURS, INT8, OPENVINO, EAGER)
        bench["segment"][OURS]["peak_mib"]["host"] = 9000.0
        bench["segment"][OURS]["startup_seconds"] = 30.0

    comparison = compared(made_up, change)
    assert not comparison.regressions
    assert comparison.notes[0].startswith(
        f"segment, label, kernels: {words}. Times, start-up and memory are not"
    )
    kinds = {change.figure for change in comparison.changes} - {"mIoU", "labels alike"}
    assert kinds == {"times reference", "end to end, times reference", "ours times as fast"}

    def ratios(bench: Bench) -> None:
        change(bench)
        bench["segment"][OPENVINO]["times_reference"] = 1.0
        bench["segment"][EAGER + 1]["times_reference"] = 0.5  # not ours
        bench["label"][0]["times_reference"] = 5.0
        bench["label"][2]["default_times_as_fast"] = 80.0
        bench["kernels"][1]["times_ours"] = 13_000.0

    assert found(compared(made_up, ratios)) == [
        ("segment", "times reference", "slower"),
        ("label", "times reference", "slower"),
        ("label", "ours times as fast", "slower"),
        ("kernels", "ours times as fast", "slower"),
    ]


def test_ratios_to_another_reference_are_not_compared(made_up: Bench) -> None:
    def change(bench: Bench) -> None:
        bench["environment"]["cores"] = 4
        bench["segment"][EAGER]["reference"] = False
        bench["segment"][OURS]["reference"] = True
        for row in bench["segment"][:4]:
            row["times_reference"] /= 2.5

    comparison = compared(made_up, change)
    assert not comparison.regressions
    assert "segment: the reference is not as then: ratios to it are not compared." in comparison.notes


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


def test_rows_that_ran_and_rows_that_run_now(made_up: Bench) -> None:
    new = deepcopy(made_up)
    new["segment"][OPENVINO] = {
        "engine": "openvino",
        "precision": "fp32",
        "device": "cpu",
        "problem": "openvino is not installed: pip install openvino",
    }
    comparison = compare_benches(new, made_up)
    (worse,) = comparison.regressions
    assert str(worse) == (
        "segment: OpenVINO fp32, runs: ran then, and now: openvino is not installed: pip install openvino"
    )
    (better,) = compare_benches(made_up, new).improvements
    assert better.verdict == "did not run then"


def test_what_only_one_report_has(made_up: Bench) -> None:
    new = deepcopy(made_up)
    del new["label"], new["segment"][INT8], new["segment"][OURS]["miou"]
    new["kernels"][0]["way"] = "multisa, blocked"
    comparison = compare_benches(new, made_up)
    assert not comparison.regressions
    assert set(comparison.unmatched) == {
        "segment: ONNX Runtime, CPU int8: only in the old report",
        "segment: ONNX Runtime, CPU fp32, mIoU: only in the old report",
        "label: only in the old report",
        "kernels: random walk: multisa 64x64x4: only in the old report",
        "kernels: random walk: multisa, blocked 64x64x4: only in the new report",
    }
    assert "not compared: label: only in the old report" in comparison.text()


def test_another_gpu_is_another_row(made_up: Bench) -> None:
    made_up["environment"]["gpus"] = ["Made-up GPU"]
    made_up["segment"][6] = {**deepcopy(made_up["segment"][OURS]), "engine": "tensorrt", "device": "cuda"}

    def change(bench: Bench) -> None:
        bench["environment"]["gpus"] = []
        bench["segment"][6] = {**bench["segment"][6], "problem": "no GPU is here"}

    comparison = compared(made_up, change)
    assert not comparison.regressions
    (line,) = comparison.unmatched
    assert line.startswith("segment: TensorRT fp32: gpus not as then")


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
        "2 worse, 0 better, 63 as before",
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
    for pair in ((made_up, {"schema_version": 1}), ({}, made_up)):
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
    assert len(compare_benches(made_up, made_up).changes) == 60 + 500
