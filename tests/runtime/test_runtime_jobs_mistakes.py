"""Mistakes that people make with a run, and what they are told."""

import json
from pathlib import Path

import pytest
from job_runs import records, run_label, run_segment

from multisa.runtime.backends.registry import BackendRequest
from multisa.runtime.bundle import Bundle
from multisa.runtime.errors import TooManyFailures, UsageError
from multisa.runtime.jobs.spec import REMOTE_READERS, RunOptions, make_job
from multisa.runtime.jobs.telemetry import JsonLog


def test_results_are_not_written_to_a_url(photos: Path, bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="is a URL, expected a local or mounted folder"):
        run_segment(photos, Path("s3://bucket/out"), bundle)
    assert not Path("s3:").exists()


def test_labels_about_none_of_the_images(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    labels.write_text("image,labels\nelsewhere/z.jpg,green\n")
    expected = r"has no row for any of 6 images: got rows such as elsewhere/z\.jpg, expected paths .*, such as a\.jpg"
    with pytest.raises(UsageError, match=expected):
        run_label(photos, tmp_path / "out", bundle, labels=labels)
    labels.write_text("image,labels\na.jpg,green\n")
    assert run_label(photos, tmp_path / "out", bundle, labels=labels).done == 5  # nothing is in the way
    labels.write_text("image,labels\na.jpg,red thing\n")
    with pytest.raises(UsageError, match="labels: got another label file, or one that has changed"):
        run_label(photos, tmp_path / "out", bundle, labels=labels)


def test_a_restart_does_not_creep_past_the_failures_allowed(photos: Path, bundle: Bundle, tmp_path: Path) -> None:
    run = {"shard_size": 1, "max_failures": "0", "workers": 1}
    for name in ("c.jpg", "d.jpg", "e.jpg", "f.jpg", "g.jpg", "h.jpg", "i.jpg", "j.jpg"):
        (photos / name).write_bytes(b"no image either")
    with pytest.raises(TooManyFailures, match="allowed were 0"):
        run_segment(photos, tmp_path / "out", bundle, **run)
    journal = (tmp_path / "out/.multisa/journal.jsonl").read_bytes()
    assert journal.count(b"\n") < 14
    with pytest.raises(TooManyFailures, match="allowed were 0"):
        run_segment(photos, tmp_path / "out", bundle, **run)
    assert (tmp_path / "out/.multisa/journal.jsonl").read_bytes() == journal
    summary = run_segment(photos, tmp_path / "out", bundle, shard_size=1, max_failures="9")
    assert (summary.done, summary.failures) == (5, 9) and len(records(tmp_path / "out")) == 5


def test_shards_beyond_reason() -> None:
    with pytest.raises(UsageError, match="shard_size: got 10000000000000000000000, expected at most 1000000"):
        RunOptions(shard_size=10**22)


def test_a_list_of_urls_is_read_by_many(tmp_path: Path) -> None:
    def readers(source: str) -> int:
        options = RunOptions(workers=3)
        return make_job("segment", source, tmp_path, tmp_path, BackendRequest(), options).pipeline.readers

    urls, paths = tmp_path / "urls.txt", tmp_path / "paths.txt"
    urls.write_text("https://example.org/a.jpg\n")
    paths.write_text("a.jpg\n")
    assert readers(str(urls)) == readers("s3://bucket/photos") == REMOTE_READERS
    assert readers(str(paths)) == readers("photos") == readers("file:///photos") == 3


def test_the_log_may_lie_in_a_folder_to_come(tmp_path: Path) -> None:
    with JsonLog(str(tmp_path / "out/logs/run.jsonl")) as log:
        log.event("run started")
    assert json.loads((tmp_path / "out/logs/run.jsonl").read_text())["event"] == "run started"
