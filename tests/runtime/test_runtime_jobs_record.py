"""What a run keeps of itself for people who look later."""

import json
from pathlib import Path

import pytest
from job_runs import run_segment

from multisa.runtime.backends.registry import BackendRequest
from multisa.runtime.bundle import Bundle
from multisa.runtime.jobs.executors.local import LocalExecutor
from multisa.runtime.jobs.output import RUN
from multisa.runtime.jobs.record import without_secrets
from multisa.runtime.jobs.run import run
from multisa.runtime.jobs.spec import Job, RunOptions, make_job
from multisa.runtime.sources.registry import open_source


@pytest.mark.parametrize(
    ("source", "kept"),
    [
        ("photos", "photos"),
        ("photos/a?b@c:d", "photos/a?b@c:d"),  # a folder may be named so
        ("https://host/a.tar?X-Amz-Signature=secret&e=1", "https://host/a.tar"),
        ("https://user:secret@host:8080/photos/#secret", "https://host:8080/photos/"),
        ("https://token@host/photos", "https://host/photos"),
        ("s3://KEY:sec/ret+1@bucket/photos", "s3://bucket/photos"),
        ("s3://bucket/photos@2x/", "s3://bucket/photos@2x/"),
        ("http://host:8080/photos@2x/a", "http://host:8080/photos@2x/a"),
    ],
)
def test_no_secret_is_kept(source: str, kept: str) -> None:
    assert without_secrets(source) == kept


def test_the_record_holds_no_secret(
    photos: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_segment(photos, tmp_path / "out", bundle)
    assert json.loads((tmp_path / "out" / RUN).read_bytes())["source"] == str(photos)

    monkeypatch.setattr(Job, "open_source", lambda job, _=(): open_source(str(photos)))
    job = make_job(
        "segment", "https://u:p@h/a?s=1", tmp_path / "url", bundle.path, BackendRequest(), RunOptions(report_images=0)
    )
    run(job, RunOptions(report_images=0), LocalExecutor)
    assert json.loads((tmp_path / "url" / RUN).read_bytes())["source"] == "https://h/a"
