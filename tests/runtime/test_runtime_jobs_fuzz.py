"""A thousand damaged files through a whole run: each has a mask or a reason, and none is lost."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from job_runs import public_bytes, records
from test_runtime_fuzz import FILES, damaged, sources

from multisa.runtime.bundle import Bundle

SECONDS = 120  # far above what a run takes; beyond it something hangs


@pytest.mark.slow
def test_every_damaged_file_is_labelled_or_listed(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    files = sources()
    for number in range(FILES):
        data = damaged(files[number % len(files)], random.Random(number))
        (folder / f"{number:04d}.jpg").write_bytes(data)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "multisa.runtime.cli.main", "segment", str(folder), "-o", str(out)]
    command += ["--bundle", str(bundle.path), "--max-pixels", "1000000", "--writer", "masks,coco"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert finished.returncode == 4, finished.stderr
    assert "Traceback" not in finished.stderr
    done, failed = records(out), records(out, "failed.jsonl")
    assert sorted(row["index"] for row in (*done, *failed)) == list(range(FILES))
    assert len(done) > 50 and len(failed) > 50  # both ways were taken
    assert all(row["reason"] and row["kind"] in ("read", "decode") for row in failed)
    masks = {path for path in public_bytes(out) if path.startswith("masks/")}
    assert masks == {row["mask"] for row in done}
