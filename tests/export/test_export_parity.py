"""The gate: figures are right, each limit is kept, and what is not a number never passes."""

import json
from dataclasses import replace

import numpy as np
import pytest

from multisa.export.parity import CONFIDENT, LIMITS, Compared, Limit, measure_parity
from multisa.runtime.errors import ParityError, UsageError


def labels_of(wrong: int) -> np.ndarray:
    labels = np.zeros((1, 100, 100), np.uint8)
    labels.reshape(-1)[:wrong] = 1
    return labels


def test_figures_are_those_of_the_definition() -> None:
    confidence = np.full((1, 100, 100), 255, np.uint8)
    confidence.reshape(-1)[:40] = CONFIDENT - 1  # 40 of the 50 wrong pixels are not confident
    truth = labels_of(0)[0]
    truth[-1] = 255
    expected = {"labels": labels_of(0), "confidence": confidence}
    got = {"labels": labels_of(50), "confidence": confidence - 2}
    report = measure_parity([Compared(expected, got, {"labels": truth})] * 2, "int8", n_classes=2)
    figures = report.differences["labels"].figures()
    assert figures["agreement"] == pytest.approx(1 - 50 / 10000)
    assert figures["confident_agreement"] == pytest.approx(1 - 10 / 9960)
    # 9900 pixels of truth, all background; class 1 occurs only where the graph is wrong.
    assert figures["miou_reference"] == pytest.approx(100)
    assert figures["miou"] == pytest.approx(100 * (9850 / 9900) / 2)
    assert report.differences["confidence"].figures() == {"max_error": 2, "mean_error": 2}
    assert report.images == 2
    assert report.full_json()["figures"]["labels"]["images_with_truth"] == 2
    # An error of 2 is a quarter of what int8 may have.
    int8 = replace(report.differences["confidence"], limit=LIMITS["int8"]["confidence"])
    assert int8.shares()["mean_error"] == 0.25


@pytest.mark.parametrize(
    ("precision", "name", "expected", "got", "problem"),
    [
        ("fp32", "labels", labels_of(0), labels_of(100), r"99\.0000% of the labels agree, needed 99\.90%"),
        ("fp16", "labels", labels_of(0), labels_of(100), r"99\.0000% of the labels agree, needed 99\.80%"),
        ("fp32", "cam", np.zeros((1, 2)), np.array([[0, 0.06]]), "largest difference 0.06, allowed 0.05"),
        ("fp32", "affinity", np.zeros((1, 2)), np.full((1, 2), 0.01), "mean difference 0.01, allowed 0.002"),
        ("fp32", "scores", np.zeros((1, 2)), np.array([[0, np.nan]]), "1 values are not finite"),
        # Infinity minus infinity is no number: equal infinities do not pass for equal answers either.
        ("fp32", "scores", np.full((1, 2), np.inf), np.full((1, 2), np.inf), "2 values are not finite"),
        ("fp32", "scores", np.array([[np.nan, 0]]), np.zeros((1, 2)), "1 values are not finite"),
    ],
)
def test_every_figure_beyond_its_limit_is_named(
    precision: str, name: str, expected: np.ndarray, got: np.ndarray, problem: str
) -> None:
    report = measure_parity([Compared({name: expected}, {name: got})], precision)
    assert report.share() > 1
    with pytest.raises(ParityError, match=f"graphs: {name}: {problem}") as raised:
        report.require("graphs")
    assert raised.value.exit_code == 3
    assert not report.full_json()["passed"]
    json.dumps(report.full_json(), allow_nan=False)


def test_all_problems_are_in_one_message() -> None:
    broken = np.full((1, 2), np.nan, np.float32)
    pair = Compared(
        {"labels": labels_of(0), "scores": np.zeros((1, 2), np.float32)}, {"labels": labels_of(100), "scores": broken}
    )
    with pytest.raises(ParityError, match=r"scores: 2 values are not finite; labels: 99\.0000%"):
        measure_parity([pair]).require("graphs")


def test_a_loss_of_miou_is_a_problem_and_a_gain_is_none() -> None:
    truth = labels_of(5000)[0]
    for wrong, passes in ((4800, False), (5000, True)):
        reference, answer = labels_of(4950), labels_of(wrong)
        pair = Compared({"labels": reference}, {"labels": answer}, {"labels": truth})
        problems = measure_parity([pair], "int8", n_classes=2).problems()
        assert passes == (not any("mIoU" in line for line in problems)), problems


@pytest.mark.parametrize("name", [*LIMITS["fp32"]])
def test_an_output_without_values_does_not_pass(name: str) -> None:
    empty = {name: np.zeros((1, 0), np.float32)}
    report = measure_parity([Compared(empty, empty)])
    assert report.problems()[0].startswith(f"{name}: no value was compared") and report.share() > 1
    json.dumps(report.full_json(), allow_nan=False)
    # An output that nothing is asked of asks for no values either.
    assert replace(report.differences[name], limit=Limit()).breaches() == []


def test_what_cannot_be_compared_is_no_parity() -> None:
    with pytest.raises(ParityError, match="no image"):
        measure_parity([]).require("graphs")
    with pytest.raises(ParityError, match="shapes differ"):
        measure_parity([Compared({"cam": np.zeros(2)}, {"cam": np.zeros(3)})])
    with pytest.raises(ParityError, match="expected cam among them"):
        measure_parity([Compared({"cam": np.zeros(2)}, {})])
    same, truth = {"labels": labels_of(0)}, {"labels": np.full((100, 100), 7, np.uint8)}
    with pytest.raises(UsageError, match=r"class 7, expected 0\.\.1"):
        measure_parity([Compared(same, same, truth)], n_classes=2)
