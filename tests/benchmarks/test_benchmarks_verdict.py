"""The report in sentences: each is made of its figures."""

import sys
from pathlib import Path
from typing import Any

import pytest

from multisa.benchmarks.report import summary_lines, write_report
from multisa.benchmarks.report.verdict import verdict

Bench = dict[str, Any]
OURS, INT8, OPENVINO, EAGER = 0, 1, 2, 3  # rows of segment


def test_the_sentences_and_where_they_are(
    made_up: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # whole pages take seconds with it
    first, second, third, fourth = summary_lines(made_up)[:4]
    assert first == (
        "On this machine (Made-up Processor 9000, 2 cores, AVX512) the default is ONNX Runtime, CPU fp32, on "
        "the CPU: it segments 31.2 images/s from file to file, 2.60 times PyTorch eager fp32 in a plain loop "
        "(opening not counted); the engine alone, in the same loop, does 18.7 images/s, 1.56 times; one "
        "photograph takes 40.0 ms against 100; its mIoU is 61.23 against 61.22."
    )
    assert second == (
        "The fastest from file to file at equal mIoU (not more than 0.1 below the bundle's fp32 graph) is "
        "ONNX Runtime, CPU fp32, on the CPU, with 31.2 images/s: the default."
    )
    assert third == (
        "Faster at a lower mIoU: ONNX Runtime, CPU int8, on the CPU (38.5 images/s, mIoU 0.35 lower)."
    )
    assert "does 5.56 images/s from file to file: 6.60 times as fast as PyTorch eager, sparse walk" in fourth
    assert "dense walk, pydensecrf (of 4,096 pixels each)" in fourth
    write_report(made_up, tmp_path)
    html, text = ((tmp_path / name).read_text(encoding="utf-8") for name in ("bench.html", "bench.md"))
    assert first in html and fourth in html and "the default is ONNX Runtime, CPU fp32" in text


def test_the_baseline_is_that_of_the_default_s_device(made_up: Bench) -> None:
    rows = made_up["segment"]
    on_gpu = {**rows[EAGER], "device": "cuda", "miou": 60.5, "latency_ms": {"p50": 4.0}}
    rows.append(on_gpu)
    assert "against 100; its mIoU is 61.23 against 61.22." in verdict(made_up)[0]
    rows[OURS]["device"] = "cuda"
    (first, *_) = verdict(made_up)
    assert "on the GPU" in first and "times PyTorch eager fp32, cuda in a plain loop" in first
    assert "against 4.00; its mIoU is 61.23 against 60.50." in first
    rows.remove(on_gpu)  # the only baseline there is, if of another device
    assert "2.60 times PyTorch eager fp32 in a plain loop" in verdict(made_up)[0]


def test_without_a_baseline_or_with_little_there_are_no_ratios(made_up: Bench) -> None:
    default = made_up["segment"][OURS]
    made_up["segment"] = [{**default, "baseline": True}]
    assert verdict(made_up)[0].endswith(
        "it segments 31.2 images/s from file to file (opening not counted); the engine alone, in the same "
        "loop, does 18.7 images/s; one photograph takes 40.0 ms; its mIoU is 61.23."
    )
    assert "fastest" not in verdict(made_up)[1]  # of one
    for key in ("images_per_second", "end_to_end", "loop", "miou"):
        del made_up["segment"][0][key]
    assert verdict(made_up)[0].endswith(
        "the default is ONNX Runtime, CPU fp32, on the CPU: one photograph takes 40.0 ms."
    )
    del made_up["segment"][0]["latency_ms"], made_up["label"]
    assert verdict(made_up) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {OPENVINO: {"images_per_second": 40.0}},
            "OpenVINO fp32, on the CPU, with 40.0 images/s: not the default, and 1.28 times as fast.",
        ),
        (
            {OPENVINO: {"images_per_second": 31.5}},
            "OpenVINO fp32, on the CPU, with 31.5 images/s: not the default, which is within 3% of it.",
        ),
        ({OPENVINO: {"images_per_second": 40.0, "miou": 61.1}}, "with 31.2 images/s: the default."),
        ({OPENVINO: {"images_per_second": 40.0, "miou": 61.13}}, "with 40.0 images/s: not the default"),
        (
            {OURS: {"default": False}, INT8: {"default": True}},
            "with 31.2 images/s: not the default, whose mIoU is 0.35 lower.",
        ),
        (
            {OURS: {"miou": None}, OPENVINO: {"miou": None}},
            "file among all, mIoU not being known, is ONNX Runtime, CPU int8",
        ),
    ],
)
def test_the_fastest_at_equal_miou(made_up: Bench, changes: dict[int, dict[str, Any]], words: str) -> None:
    for row, change in changes.items():
        made_up["segment"][row].update(change)
    assert words in verdict(made_up)[1]


def test_all_that_is_faster_at_a_lower_miou_is_named(made_up: Bench) -> None:
    made_up["segment"][EAGER].update(images_per_second=50.0, miou=None)
    assert verdict(made_up)[2] == (
        "Faster at a lower mIoU: PyTorch eager fp32, on the CPU (50.0 images/s, mIoU not measured); "
        "ONNX Runtime, CPU int8, on the CPU (38.5 images/s, mIoU 0.35 lower)."
    )
