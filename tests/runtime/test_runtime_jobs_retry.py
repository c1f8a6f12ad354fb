"""--retry-failed: what is mended is done, what is not is told again, and nothing else may have changed."""

import shutil
from pathlib import Path

import pytest
from job_runs import cut_at, public_bytes, reasons, records, run_segment

from multisa.runtime.bundle import Bundle
from multisa.runtime.errors import TooManyFailures, UsageError


def test_failed_images_are_tried_again(many: Path, bundle: Bundle, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = {"shard_size": 4, "writers": ("masks", "coco", "tar")}
    run_segment(many, out, bundle, **options)
    masks = {path: data for path, data in public_bytes(out).items() if path.startswith("masks/")}
    assert set(reasons(out)) == {"04.png", "14.png", "24.png"}
    shutil.copy(many / "05.png", many / "14.png")
    with pytest.raises(UsageError, match=r"has changed since .*1 changed \(14\.png\)"):
        run_segment(many, out, bundle, **options)
    summary = run_segment(many, out, bundle, retry_failed=True, **options)
    assert (summary.done, summary.failures, summary.done_now) == (28, 2, 1)
    assert set(reasons(out)) == {"04.png", "24.png"}
    assert [row["index"] for row in records(out)] == [i for i in range(30) if i not in (4, 24)]
    after = public_bytes(out)
    assert {path: after[path] for path in masks} == masks
    assert after["masks/14.png"] == after["masks/05.png"]
    # Nothing but the images that failed may have changed, unless the images of then are asked for.
    shutil.copy(many / "05.png", many / "04.png")
    shutil.copy(many / "05.png", many / "06.png")
    with pytest.raises(UsageError, match=r"not only the failed images: 1 changed \(06\.png\): .*--skip-source-check"):
        run_segment(many, out, bundle, retry_failed=True, **options)
    shutil.copy(many / "05.png", many / "extra.png")
    summary = run_segment(many, out, bundle, retry_failed=True, skip_source_check=True, **options)
    assert summary.failures == 2 and summary.failure_kinds == {"read": 1, "decode": 1}  # another size
    with pytest.raises(UsageError, match="1 added"):
        run_segment(many, out, bundle, **options)


@pytest.mark.slow
def test_a_retry_that_is_cut(many: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outs = tmp_path / "whole", tmp_path / "out"
    for out in outs:
        run_segment(many, out, bundle, shard_size=1)
    for name in ("04", "14", "24"):
        shutil.copy(many / "05.png", many / f"{name}.png")
    run_segment(many, outs[0], bundle, shard_size=1, retry_failed=True)
    cut_at(monkeypatch, 1, before=True)
    with pytest.raises(InterruptedError):
        run_segment(many, outs[1], bundle, shard_size=1, retry_failed=True, workers=1)
    monkeypatch.undo()
    assert run_segment(many, outs[1], bundle, shard_size=1).failures == 0
    assert public_bytes(outs[1]) == public_bytes(outs[0])
    assert run_segment(many, outs[1], bundle, shard_size=1, retry_failed=True).done_now == 0


def test_a_shard_that_is_done_again_leaves_out_what_a_retry_has_done(
    many: Path, bundle: Bundle, tmp_path: Path
) -> None:
    out, options = tmp_path / "out", {"shard_size": 4, "writers": ("masks", "coco", "tar", "label-studio")}
    run_segment(many, out, bundle, **options)
    shutil.copy(many / "05.png", many / "14.png")
    run_segment(many, out, bundle, retry_failed=True, **options)
    before = public_bytes(out)
    (out / "masks/15.png").unlink()  # of the shard that 14.png has failed in
    summary = run_segment(many, out, bundle, verify=True, **options)
    assert (summary.done, summary.failures, summary.done_now) == (28, 2, 3)
    assert public_bytes(out) == before


def test_retry_where_there_is_no_run(many: Path, bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run, expected one with failed images"):
        run_segment(many, tmp_path / "out", bundle, retry_failed=True)


def test_a_retry_that_is_gone_on_with_counts_what_is_still_failed(
    many: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, broken = tmp_path / "out", [4, *range(8, 16), 24]
    for i in broken:
        (many / f"{i:02d}.png").write_bytes(b"no image")
    run_segment(many, out, bundle, shard_size=1)
    for i in broken[:-1]:
        shutil.copy(many / "05.png", many / f"{i:02d}.png")
    cut_at(monkeypatch, 1, before=False)
    with pytest.raises(InterruptedError):
        run_segment(many, out, bundle, shard_size=1, retry_failed=True, workers=1)
    monkeypatch.undo()
    assert run_segment(many, out, bundle, shard_size=1, workers=1, max_failures="1").failures == 1


def test_a_limit_counts_the_failures_of_before(many: Path, bundle: Bundle, tmp_path: Path) -> None:
    """Of shards that are committed: two images or three, of which none is tried again."""
    out = tmp_path / "out"
    run_segment(many, out, bundle, shard_size=1)
    journal = out / ".multisa/journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-9]))
    (out / "labels.jsonl").unlink()
    with pytest.raises(TooManyFailures):
        run_segment(many, out, bundle, shard_size=1, workers=1, readers=1, max_failures="1")
