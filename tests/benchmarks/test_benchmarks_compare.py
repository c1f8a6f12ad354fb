"""Two made-up reports compared: what counts as worse, what is noise, and what is the machine."""

from collections.abc import Callable
from copy import deepcopy

import pytest
from made_up import EAGER, INT8, OPENVINO, OURS, Bench, compared, found, rounds, setter, slow

from multisa.benchmarks.compare import BETTER, WORSE, RegressionError, check_against, compare_benches, judge, spread_of
from multisa.runtime.errors import UsageError


def test_a_report_is_no_worse_than_itself(made_up: Bench) -> None:
    comparison = compare_benches(made_up, made_up)
    assert comparison.only(WORSE) == comparison.only(BETTER) == comparison.notes == ()
    # 12 figures of each row that segments, 5 of each that labels, 1 of each kernel
    assert len(comparison.changes) == 5 * 12 + 3 * 5 + 5
    assert comparison.text().endswith("0 worse, 0 better, 80 same")


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
        (setter("segment", OURS, "batches", 2, "images_per_second", to=15.0), ("segment", "over batches", "slower")),
        (setter("segment", OURS, "batches", 2, "images_per_second", to=25.0), None),  # one point of four
        (setter("segment", OURS, "loop", "images_per_second", to=[15.0]), ("segment", "plain loop", "slower")),
        (setter("segment", OURS, "latency_ms", "p90", to=58.0), ("segment", "latency p90", "slower")),
        (setter("segment", OURS, "latency_ms", "p90", to=57.0), None),  # 1.19 times
        (setter("segment", OURS, "model_bytes", to=17_900_000), ("segment", "model size", "more")),
        (setter("segment", OURS, "model_bytes", to=17_850_000), None),  # 1.05 times
        (rounds(3.0, 5.0, 9.5), ("label", "end to end", "slower")),
        (rounds(3.2, 5.1, 10.5), None),
        (setter("kernels", 0, "median_ms", to=3.0), ("kernels", "median", "slower")),
        # Rows of baselines are no regressions of ours.
        (setter("segment", EAGER, "model_bytes", to=30_000_000), None),
        (setter("segment", EAGER, "peak_mib", "host", to=3000.0), None),
        (setter("segment", EAGER + 1, "latency_ms", "p50", to=200.0), None),
        (setter("kernels", 4, "median_ms", to=900.0), None),
        # On one machine the times are compared, not the ratios.
        (setter("label", 1, "default_times_as_fast", to=3.0), None),
    ],
)
def test_what_is_worse(made_up: Bench, change: Callable[[Bench], None], worse: tuple[str, str, str] | None) -> None:
    assert found(compared(made_up, change)) == ([] if worse is None else [worse])
    new = deepcopy(made_up)
    change(new)
    back = compare_benches(made_up, new)  # what is worse is better the other way round
    if worse is not None:
        (better,) = back.only(BETTER)
        assert better.figure == worse[1] and not back.only(WORSE)


def test_rounds_of_different_images_are_compared_one_by_one(made_up: Bench) -> None:
    """Their median is the same and their scatter is large: because of the images, not of noise."""
    (worse,) = compared(made_up, rounds(2.8, 5.56, 8.0)).only(WORSE)  # 0.84, 1.00 and 0.76 times as fast
    assert (worse.row, worse.figure) == (
        "label: multisa label --method segmenter, ONNX Runtime, CPU fp32",
        "end to end",
    )
    assert worse.old and worse.new and worse.new / worse.old == pytest.approx(0.84, abs=0.002)
    made_up["label"][0]["end_to_end"]["rounds"] = None  # repeats of the same images: noise
    assert not compared(made_up, rounds(2.8, 5.56, 8.0)).only(WORSE)


def test_noise_is_the_tolerance_or_the_scatter(made_up: Bench) -> None:
    change = setter("segment", OURS, "latency_ms", "p50", to=46.0)  # 1.15 times
    assert len(compared(made_up, change).only(WORSE)) == 1
    assert not compared(made_up, change, tolerance=0.2).only(WORSE)
    made_up["segment"][OURS]["latency_ms"]["repeats"] = [36.0, 36.0, 40.0, 44.0, 44.0]  # 0.1 in both reports
    comparison = compared(made_up, change)
    assert not comparison.only(WORSE)
    latency = next(c for c in comparison.changes if c.figure == "latency p50")
    assert latency.noise == pytest.approx(0.2)
    made_up["kernels"][0]["min_ms"] = 1.6  # of kernels: from the minimum to the median
    assert not compared(made_up, setter("kernels", 0, "median_ms", to=2.4)).only(WORSE)


def test_one_interruption_is_no_spread() -> None:
    assert spread_of([10.0, 10.0]) == 0.0  # too few to tell
    assert spread_of([10.0, 10.0, 10.0, 10.0, 90.0]) == 0.0
    assert spread_of([9.0, 9.0, 10.0, 11.0, 11.0]) == pytest.approx(0.1)


@pytest.mark.parametrize("path", [("data", "digest"), ("bundle", "sha256")])
def test_accuracy_is_compared_for_one_bundle_and_data(made_up: Bench, path: tuple[str, str]) -> None:
    def change(bench: Bench) -> None:
        bench["environment"][path[0]][path[1]] = "other"
        bench["segment"][OURS]["miou"] = 10.0
        bench["label"][0]["label_agreement"] = 0.1
        bench["kernels"][0]["median_ms"] = 4.0  # kernels depend on neither

    comparison = compared(made_up, change)
    assert found(comparison) == [("kernels", "median", "slower")]
    assert "mIoU and labels not compared" in comparison.notes[0]


def test_a_slower_machine_is_no_regression(made_up: Bench) -> None:
    everything = compared(made_up, lambda bench: slow(bench, 1.5, OURS, INT8, OPENVINO, EAGER, EAGER + 1))
    assert not everything.only(WORSE) and not everything.only(BETTER)
    assert any(change.reason == "slower, like the baselines" for change in everything.changes)
    both = compared(made_up, lambda bench: (slow(bench, 1.5, EAGER), slow(bench, 2.4, OURS)))
    assert {(stage, reason) for stage, _, reason in found(both)} == {("segment", "slower")}
    # Faster by itself, if less so than the baselines: not held against us.
    faster = compared(made_up, lambda bench: (slow(bench, 0.5, EAGER), slow(bench, 0.85, OURS)))
    assert not faster.only(WORSE) and not faster.only(BETTER)


def test_kernels_and_devices_have_baselines_of_their_own(made_up: Bench) -> None:
    def slower_crf(bench: Bench) -> None:
        for index in (3, 4):
            bench["kernels"][index]["median_ms"] *= 1.5

    assert not compared(made_up, slower_crf).only(WORSE)
    walk = setter("kernels", 0, "median_ms", to=3.0)
    (worse,) = compared(made_up, lambda bench: (slower_crf(bench), walk(bench))).only(WORSE)
    assert worse.row.startswith("kernels: random walk")
    made_up["environment"]["gpus"] = ["Made-up GPU"]
    for row in (OURS, EAGER):
        made_up["segment"].append({**deepcopy(made_up["segment"][row]), "device": "cuda", "default": False})
    assert not compared(made_up, lambda bench: slow(bench, 1.5, 7, 8)).only(WORSE)
    assert compared(made_up, lambda bench: slow(bench, 1.5, OURS, 8)).only(WORSE)


@pytest.mark.parametrize(("version", "is_baseline"), [("2.9.0+cu130", True), ("2.10.0", False), (None, False)])
def test_baselines_of_other_versions_say_nothing(made_up: Bench, version: str | None, is_baseline: bool) -> None:
    """Everything takes 1.5 times as long: because of the machine, if the baselines are unchanged."""

    def change(bench: Bench) -> None:
        bench["environment"]["versions"]["torch"] = version
        slow(bench, 1.5, OURS, EAGER)

    assert bool(compared(made_up, change).only(WORSE)) != is_baseline

    def elsewhere(bench: Bench) -> None:
        change(bench)
        bench["environment"]["processor"] = "Another"

    figures = {change.figure for change in compared(made_up, elsewhere).changes}
    assert ("times baseline" in figures) == is_baseline


@pytest.mark.parametrize(("key", "value"), [("processor", "Another"), ("cores", 64), ("quick", True)])
def test_another_machine_is_compared_by_ratios(made_up: Bench, key: str, value: object) -> None:
    def change(bench: Bench) -> None:
        bench["environment"][key] = value
        slow(bench, 3, OURS, INT8, OPENVINO, EAGER)
        bench["segment"][OURS]["peak_mib"]["host"] = 9000.0
        bench["segment"][OURS]["startup_seconds"] = 30.0

    comparison = compared(made_up, change)
    assert not comparison.only(WORSE)
    assert comparison.notes[0].startswith(f"another machine or effort: {key} (")
    kinds = {change.figure for change in comparison.changes} - {"mIoU", "labels alike", "model size"}
    assert kinds == {"times baseline", "end to end, times baseline", "plain loop, times baseline", "ours times as fast"}

    def ratios(bench: Bench) -> None:
        change(bench)
        bench["segment"][OPENVINO]["times_baseline"] = 1.0
        bench["segment"][EAGER + 1]["times_baseline"] = 0.5  # not ours
        bench["label"][0]["times_baseline"] = 5.0
        bench["label"][2]["default_times_as_fast"] = 80.0
        bench["kernels"][1]["times_ours"] = 13_000.0

    assert found(compared(made_up, ratios)) == [
        ("segment", "times baseline", "slower"),
        ("label", "times baseline", "slower"),
        ("label", "ours times as fast", "slower"),
        ("kernels", "ours times as fast", "slower"),
    ]


def test_ratios_to_another_baseline_are_not_compared(made_up: Bench) -> None:
    def change(bench: Bench) -> None:
        bench["environment"]["cores"] = 4
        bench["segment"][EAGER]["baseline"] = False
        bench["segment"][OURS]["baseline"] = True
        for row in bench["segment"][:4]:
            row["times_baseline"] /= 2.5

    comparison = compared(made_up, change)
    assert not comparison.only(WORSE)
    assert "segment: the baselines changed: ratios to them are not compared" in comparison.notes


def test_ratios_of_other_images_are_not_compared(made_up: Bench) -> None:
    def change(bench: Bench) -> None:
        bench["environment"]["quick"] = True
        bench["label"][2].update(mean_pixels=1024, default_times_as_fast=4.0)

    comparison = compared(made_up, change)
    assert not comparison.only(WORSE)
    rows = [c.row for c in comparison.changes if c.row.startswith("label") and "as fast" in c.figure]
    assert rows == ["label: PyTorch eager, sparse walk, pydensecrf"]


def test_rows_that_no_longer_run_and_rows_that_run_now(made_up: Bench) -> None:
    new = deepcopy(made_up)
    new["segment"][OPENVINO] = {
        "backend": "openvino",
        "precision": "fp32",
        "device": "cpu",
        "problem": "openvino is not installed",
    }
    new["label"][1]["problem"] = "no pydensecrf"  # not ours
    (worse,) = compare_benches(new, made_up).only(WORSE)
    assert worse.row == "segment: OpenVINO fp32"
    assert worse.reason == "ran before, now: openvino is not installed"
    (better,) = compare_benches(made_up, new).only(BETTER)
    assert better.reason == "runs now"


def test_what_only_one_report_has(made_up: Bench) -> None:
    new = deepcopy(made_up)
    del new["label"], new["segment"][INT8], new["segment"][OURS]["miou"]
    comparison = compare_benches(new, made_up)
    assert not comparison.only(WORSE)
    assert set(comparison.notes) == {
        "segment: ONNX Runtime, CPU int8: only in the old report",
        "label: only in the old report",
    }


def test_another_gpu_is_not_compared(made_up: Bench) -> None:
    made_up["environment"]["gpus"] = ["Made-up GPU"]
    made_up["segment"][6] = {**deepcopy(made_up["segment"][OURS]), "backend": "tensorrt", "device": "cuda"}

    def change(bench: Bench) -> None:
        bench["environment"]["gpus"] = []
        bench["segment"][6] = {**bench["segment"][6], "problem": "no GPU is here"}

    assert not compared(made_up, change).only(WORSE)


def test_the_text_is_a_table_and_a_regression_is_exit_code_3(made_up: Bench) -> None:
    new = deepcopy(made_up)
    setter("segment", OURS, "latency_ms", "p50", to=50.0)(new)
    with pytest.raises(RegressionError) as error:
        check_against(new, made_up)
    assert error.value.exit_code == 3
    head, line = (t.split("  ") for t in str(error.value).splitlines() if "verdict" in t or "WORSE" in t)
    assert [cell.strip() for cell in head if cell.strip()][:4] == ["row", "figure", "old", "new"]
    cells = [cell.strip() for cell in line if cell.strip()]
    assert cells[1:] == ["latency p50", "40.0", "50.0", "ms", "1.25×", "10%", "WORSE: slower"]
    assert check_against(made_up, made_up).endswith("80 same")
    with pytest.raises(UsageError, match="nothing to compare"):
        check_against({**made_up, "segment": [], "label": []}, {**made_up, "kernels": []})


def test_an_old_report_from_anybody_writes_no_control_characters(made_up: Bench) -> None:
    old = deepcopy(made_up)
    old["segment"][OURS]["backend"] = old["environment"]["processor"] = "\x1b[2J\nroot"
    text = compare_benches(made_up, old).text()
    assert "\x1b" not in text and "[2J root" in text


@pytest.mark.parametrize(
    ("kind", "old", "new", "drift", "reason"),
    [
        ("time", 10.0, 12.0, 1.0, "slower"),
        ("rate", 10.0, 8.0, 1.0, "slower"),
        ("ratio", 10.0, 8.0, 1.0, "slower"),
        ("time", 10.0, 12.0, 1.2, "slower, like the baselines"),
        ("time", 10.0, 8.0, 0.8, "faster, like the baselines"),
        ("time", 10.0, 10.9, 1.0, "same"),
        ("rate", 10.0, 12.0, 1.0, "faster"),
    ],
)
def test_judging_a_time(kind: str, old: float, new: float, drift: float, reason: str) -> None:
    assert judge(kind, old, new, 0.1, drift)[1] == reason
