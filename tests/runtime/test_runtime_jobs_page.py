"""The page of a run: there whatever cut the run's end, and gone with the run it shows."""

import json
from pathlib import Path
from typing import Any

import pytest
from job_runs import public_bytes, run_segment

from multisa.runtime.bundle import Bundle
from multisa.runtime.jobs import run as run_module
from multisa.runtime.jobs.output import RUN


def pictures(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "report").glob("*.jpg"))


def test_a_kill_while_the_page_is_made_loses_no_page(
    photos: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: Any) -> None:
        raise InterruptedError("cut by the test")

    monkeypatch.setattr(run_module, "write_run_report", cut)
    with pytest.raises(InterruptedError):
        run_segment(photos, tmp_path / "out", bundle)
    monkeypatch.undo()
    record = (tmp_path / "out" / RUN).read_bytes()
    assert run_segment(photos, tmp_path / "out", bundle).done_now == 0
    assert "report.html" in [path.name for path in (tmp_path / "out").iterdir()]
    assert pictures(tmp_path / "out")
    # What the page tells of times is of the session that did the images.
    assert (tmp_path / "out" / RUN).read_bytes() == record and json.loads(record)["images"] == 5


def test_a_kill_before_the_record_loses_neither(
    photos: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: Any) -> None:
        raise InterruptedError("cut by the test")

    monkeypatch.setattr(run_module, "write_record", cut)
    with pytest.raises(InterruptedError):
        run_segment(photos, tmp_path / "out", bundle)
    monkeypatch.undo()
    run_segment(photos, tmp_path / "out", bundle)
    assert (tmp_path / "out" / RUN).is_file() and (tmp_path / "out/report.html").is_file()


def test_a_page_may_be_asked_for_later(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_segment(photos, out, bundle, report_images=0)
    results = public_bytes(out)
    assert not (out / "report.html").exists()
    run_segment(photos, out, bundle, report_images=2)
    few, page = pictures(out), (out / "report.html").stat().st_mtime_ns
    run_segment(photos, out, bundle, report_images=2)
    run_segment(photos, out, bundle, report_images=0)
    assert (out / "report.html").stat().st_mtime_ns == page
    run_segment(photos, out, bundle, report_images=4)
    assert len(few) < len(pictures(out))
    (out / "report.html").unlink()
    run_segment(photos, out, bundle, report_images=4)
    assert (out / "report.html").is_file() and public_bytes(out) == results


def test_overwrite_removes_the_page_and_its_pictures(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_segment(photos, out, bundle)
    (out / "report/mine.txt").write_text("mine")
    assert pictures(out)
    run_segment(photos, out, bundle, overwrite=True, report_images=0)
    assert not (out / "report.html").exists() and not pictures(out)
    assert (out / "report/mine.txt").read_text() == "mine"
    (out / "report/mine.txt").unlink()
    run_segment(photos, out, bundle, overwrite=True, report_images=0)
    assert not (out / "report").exists()
