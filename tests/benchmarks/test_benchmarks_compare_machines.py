"""Two reports of made-up figures compared: what is the machine, what runs no longer, what only one has."""

from copy import deepcopy
from typing import Any

import pytest
from made_up import EAGER, INT8, OPENVINO, OURS, Bench, compared, found, setter, slow

from multisa.benchmarks.report import compare_benches


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
    kinds = {change.figure for change in comparison.changes} - {"mIoU", "labels alike", "model size"}
    assert kinds == {
        "times baseline",
        "end to end, times baseline",
        "plain loop, times baseline",
        "ours times as fast",
    }

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
    assert not comparison.regressions
    assert "segment: the baseline is not as then: ratios to it are not compared." in comparison.notes


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


def test_what_is_not_ours_and_runs_no_longer_is_a_note(made_up: Bench) -> None:
    new = deepcopy(made_up)
    new["segment"][EAGER + 1]["problem"] = "killed for memory"
    new["label"][1]["problem"] = "no pydensecrf"
    comparison = compare_benches(new, made_up)
    assert not comparison.regressions
    assert comparison.notes == (
        "segment: PyTorch channels_last + autocast bf16 ran then, and is not ours: now killed for memory",
        "label: PyTorch eager, sparse walk, pydensecrf ran then, and is not ours: now no pydensecrf",
    )
    back = compare_benches(made_up, new)
    assert not back.improvements and not back.notes


def test_another_default_is_said(made_up: Bench) -> None:
    def change(bench: Bench) -> None:
        bench["segment"][OURS]["default"] = False
        bench["segment"][OPENVINO]["default"] = True

    comparison = compared(made_up, change)
    assert not comparison.regressions
    assert comparison.notes == ("segment: the default is OpenVINO fp32; then it was ONNX Runtime, CPU fp32.",)


@pytest.mark.parametrize(
    ("package", "version", "alike"),
    [
        ("torch", "2.9.0+cu130", True),
        ("torch", "2.10.0", False),
        ("scipy", "1.18", True),
        ("torch", None, False),
    ],
)
def test_other_versions_are_no_yardstick(made_up: Bench, package: str, version: Any, alike: bool) -> None:
    """Everything takes 1.5 times as long: the machine, if what it is measured by has not changed."""

    def change(bench: Bench) -> None:
        bench["environment"]["versions"][package] = version
        slow(bench, 1.5, OURS, EAGER)

    comparison = compared(made_up, change)
    assert {change.row for change in comparison.regressions} == (
        set() if alike else {"ONNX Runtime, CPU fp32"}
    )
    note = next(note for note in comparison.notes if note.startswith("segment"))
    told = "what is not ours does not tell how fast the machine was, and ratios to it are not compared."
    assert note.endswith(told) != alike

    def elsewhere(bench: Bench) -> None:
        change(bench)
        bench["environment"]["processor"] = "Another"

    kinds = {(change.stage, change.figure) for change in compared(made_up, elsewhere).changes}
    assert (("segment", "times baseline") in kinds) == alike


def test_the_machine_is_measured_on_each_device(made_up: Bench) -> None:
    """A GPU that is slower says nothing of the CPU."""
    made_up["environment"]["gpus"] = ["Made-up GPU"]
    for row in (OURS, EAGER):
        made_up["segment"].append({**deepcopy(made_up["segment"][row]), "device": "cuda", "default": False})
    comparison = compared(made_up, lambda bench: slow(bench, 1.5, 7, 8))
    assert not comparison.regressions
    (note,) = comparison.notes
    assert note.startswith("segment: PyTorch eager fp32, cuda takes 1.50 times as long")
    assert compared(made_up, lambda bench: slow(bench, 1.5, OURS, 8)).regressions


def test_ratios_of_other_photographs_are_not_compared(made_up: Bench) -> None:
    def change(bench: Bench) -> None:
        bench["environment"]["quick"] = True
        bench["label"][2].update(mean_pixels=1024, default_times_as_fast=4.0)

    comparison = compared(made_up, change)
    assert not comparison.regressions
    assert [c.row for c in comparison.changes if (c.stage, c.figure) == ("label", "ours times as fast")] == [
        "PyTorch eager, sparse walk, pydensecrf"
    ]
