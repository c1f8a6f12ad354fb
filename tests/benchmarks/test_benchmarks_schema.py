"""What is a report and what is none, and texts that are too long for one."""

import json
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from multisa.benchmarks.report import (
    compare_benches,
    cut_text,
    cut_texts,
    read_bench,
    validate_bench,
    write_report,
)
from multisa.runtime.errors import UsageError

Bench = dict[str, Any]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema_version",), 2, "schema_version: got 2, expected 1"),
        (("schema_version",), True, "schema_version: got True, expected 1"),
        (("environment",), [], "environment: got a list, expected an object"),
        (("environment", "gpus"), ["a"] * 101, "environment.gpus: got 101 entries, expected at most 100"),
        (("environment", "versions"), {"a": 1}, "environment.versions.a: got 1, expected a text"),
        (("segment",), {}, "segment: got an object, expected a list"),
        (("segment",), [{}] * 501, "segment: got 501 entries, expected at most 500"),
        (("segment", 0), None, "segment[0]: got None, expected an object"),
        (("segment", 0, "engine"), None, "segment[0].engine: got None, expected a text"),
        (("segment", 0, "precision"), 3, "segment[0].precision: got 3, expected a text"),
        (("segment", 0, "default"), "yes", "segment[0].default: got 'yes', expected true or false"),
        (("segment", 0, "miou"), float("nan"), "segment[0].miou: got nan, expected a number from 0 to 100"),
        (("segment", 0, "miou"), True, "segment[0].miou: got True, expected a number"),
        (("segment", 0, "latency_ms", "p50"), float("inf"), "p50: got inf, expected a number from 1e-12"),
        (("segment", 0, "latency_ms", "p50"), 0, "p50: got 0, expected a number from 1e-12"),
        (("segment", 0, "latency_ms", "p50"), 10**400, "p50: got a number beyond 1e18"),
        (("segment", 0, "latency_ms", "repeats"), [1.0] * 2001, "repeats: got 2001 entries"),
        (
            ("segment", 0, "batches", 0, "batch"),
            None,
            "segment[0].batches[0].batch: got None, expected a num",
        ),
        (("segment", 0, "images_per_second"), -1.0, "images_per_second: got -1.0"),
        (("segment", 0, "label_agreement"), 1.5, "label_agreement: got 1.5, expected a number from 0 to 1"),
        (("segment", 0, "problem"), "x" * 2001, "problem: got a text of 2001 characters"),
        (("segment", 0, "problem"), "\ud800", "expected a text that can be written as UTF-8"),
        (("segment", 1, "precision"), "fp32", "segment[1]: got the same engine, precision, device as segm"),
        (("label", 0, "stages_ms"), [1], "label[0].stages_ms: got a list, expected an object"),
        (("label", 0, "photographs"), 1.5, "label[0].photographs: got 1.5, expected a whole number"),
        (("kernels", 0, "size"), {"w": 1}, "kernels[0].size: got an object, expected a text"),
        (("kernels", 0, "threads"), 1.5, "kernels[0].threads: got 1.5, expected a whole number"),
        (("kernels", 0, "miou"), "=1", "kernels[0].miou: got '=1', expected a number"),  # of another stage
        (("kernels", 0, "limit"), "no", "kernels[0].limit: got 'no', expected an object"),
    ],
)
def test_what_is_no_report_is_refused(
    made_up: Bench, path: tuple[str | int, ...], value: object, message: str
) -> None:
    inside: Any = made_up
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    with pytest.raises(UsageError) as error:
        validate_bench(made_up)
    assert message in str(error.value)
    assert str(error.value).endswith("give a bench.json that `multisa bench` wrote")
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON that can be read"),
        (b"\xff\xfe\x00", "is not JSON that can be read"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"schema_version": 1' + b"0" * 5000 + b"}", "is not JSON that can be read"),
        (b"[]", "the file: got a list, expected an object"),
        (b'{"schema_version": 1, "environment": {"seconds": NaN}}', "environment.seconds: got nan"),
        (b" " * ((16 << 20) + 1), "got more than 16 MiB"),
        (None, "cannot be read: No such file"),
    ],
)
def test_files_that_cannot_be_reports(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "bench.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        read_bench(path)
    assert str(path) in str(error.value) and message in str(error.value)


def test_a_report_is_read_back(made_up: Bench, tmp_path: Path) -> None:
    made_up["later"] = {"a": [[[]]]}  # a key of a later version is not looked at
    (tmp_path / "bench.json").write_text(json.dumps(made_up), encoding="utf-8")
    assert read_bench(tmp_path / "bench.json") == made_up


def test_long_texts_are_cut_by_who_writes_them(
    made_up: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    old = deepcopy(made_up)
    said = "Traceback: " + "x" * 50_000 + " no C++ compiler \udcff"
    made_up["segment"][5]["problem"] = said
    made_up["segment"][0]["notes"] = [said, "short"]
    with pytest.raises(UsageError, match=r"got a text of 500\d\d characters, expected at most 2000"):
        validate_bench(made_up)
    validate_bench(cut_texts(made_up))
    write_report(made_up, tmp_path)
    assert "no C++ compiler ?" in (tmp_path / "bench.html").read_text(encoding="utf-8")
    assert not compare_benches(made_up, old).regressions
    with pytest.raises(UsageError, match="expected at most 2000"):
        compare_benches(old, made_up)  # which may be anybody's
    assert made_up["segment"][5]["problem"] == said  # as it was


@pytest.mark.parametrize(
    ("text", "limit", "cut"),
    [
        ("as it is", 8, "as it is"),
        ("start 0123456789 end", 17, "start [...] 9 end"),
        ("0123456789", 3, " [."),
        ("\ud800", 5, "?"),
        ("", 5, ""),
    ],
)
def test_cut_text(text: str, limit: int, cut: str) -> None:
    assert cut_text(text, limit) == cut
