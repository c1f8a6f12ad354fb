"""Telemetry: whole JSON lines from many threads, metrics that Prometheus' own parser reads."""

import json
import socket
import sys
import threading
import urllib.request
from datetime import datetime
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from multisa.runtime.backends.registry import BackendRequest
from multisa.runtime.bundle import Bundle
from multisa.runtime.errors import BackendUnavailable, MultisaError, UsageError
from multisa.runtime.jobs import telemetry as telemetry_module
from multisa.runtime.jobs.executors.local import LocalExecutor
from multisa.runtime.jobs.run import run
from multisa.runtime.jobs.spec import RunOptions, make_job
from multisa.runtime.jobs.telemetry import JsonLog, Telemetry
from multisa.runtime.progress import Progress, log


def events(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scrape(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        return answer.read().decode()


def samples(text: str) -> dict[tuple[str, str], float]:
    return {
        (sample.name, "".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_events_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with Telemetry(log_json=str(path)) as telemetry:
        telemetry.run_started("segment", images=3, kept=1, source="photos")
        telemetry.images_done()
        telemetry.image_failed("a\nb\udcff.jpg", "broken", "ImageError")
        telemetry.shard_committed(0, 2)
        telemetry.run_finished()
    told = events(path)
    expected = ["run started", "image failed", "shard committed", "run finished"]
    assert [event["event"] for event in told] == expected
    assert told[0]["source"] == "photos" and told[1]["image"] == "a\nb\udcff.jpg"
    assert told[1]["level"] == "warning" and told[3]["done"] == 1 and told[3]["failed"] == 1
    assert all(datetime.fromisoformat(event["time"]).utcoffset().total_seconds() == 0 for event in told)


def test_lines_of_many_threads_stay_whole(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with JsonLog(str(path)) as log:
        threads = [
            threading.Thread(target=lambda n=n: [log.event("e", n=n, i=i, pad="x" * 500) for i in range(50)])
            for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    told = [(event["n"], event["i"]) for event in events(path)]
    assert sorted(told) == [(n, i) for n in range(8) for i in range(50)]
    log.event("late")  # of a thread that outlives the run: nothing is written to a descriptor given back
    assert len(events(path)) == 400


def test_a_cut_line_is_ended_and_the_log_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"event": "first"}\n{"event": "cu')
    with JsonLog(str(path)) as log:
        log.event("next")
    lines = path.read_text().splitlines()
    assert lines[1] == '{"event": "cu' and json.loads(lines[2])["event"] == "next" and len(lines) == 3


def test_a_log_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot open the log .*, expected a file in an existing folder"):
        Telemetry(log_json=str(tmp_path / "file" / "log.jsonl")).__enter__()


def test_a_full_disk_ends_the_log_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with JsonLog(str(tmp_path / "log.jsonl")) as log:
        monkeypatch.setattr(telemetry_module.os, "write", full)
        log.event("one")
        log.event("two")
        monkeypatch.undo()
    assert capsys.readouterr().err.count("the log ends here: No space left on device") == 1


def test_stderr_holds_json_and_nothing_else(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multisa.runtime.progress.LINE_INTERVAL", 0.0)
    with Telemetry(log_json="-") as telemetry, Progress(2, "segment") as progress:
        telemetry.run_started("segment", images=2)
        log.info("a backend was chosen")
        progress.advance()
    said = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [event["event"] for event in said] == ["run started", "message"]
    assert said[1]["message"] == "a backend was chosen"
    log.info("to people again")
    assert capfd.readouterr().err == "to people again\n"


def test_progress_is_told_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, now = tmp_path / "log.jsonl", [100.0]
    monkeypatch.setattr(telemetry_module.time, "monotonic", lambda: now[0])
    with Telemetry(log_json=str(path)) as telemetry:
        telemetry.run_started("label", images=100)
        for _ in range(100):
            now[0] += 0.25
            telemetry.images_done()
    told = [event for event in events(path) if event["event"] == "progress"]
    assert [event["done"] for event in told] == [40, 80]
    assert told[0]["images_per_second"] == 4.0 and told[1]["seconds"] == 20.0


def test_metrics_are_what_was_told() -> None:
    with Telemetry(metrics_port=0) as telemetry:
        telemetry.run_started("segment", images=10, kept=2)
        for _ in range(3):
            telemetry.images_done()
        telemetry.image_failed("a", "broken", "ImageError")
        telemetry.stage_busy("commit", 0.125)
        telemetry.stage_busy("decode", 0.5)
        telemetry.stage_busy("decode", 0.25)
        telemetry.shard_committed(0, 3)
        telemetry.queue_depth("segmenter", 7)
        telemetry.in_flight(4)
        text = scrape(telemetry.metrics_port)
    found = samples(text)
    expected = {
        ("multisa_images", ""): 8,
        ("multisa_images_done_total", ""): 3,
        ("multisa_images_failed_total", "ImageError"): 1,
        ("multisa_stage_busy_seconds_total", "decode"): 0.75,
        ("multisa_stage_busy_seconds_total", "commit"): 0.125,
        ("multisa_queue_depth", "segmenter"): 7,
        ("multisa_shards_committed_total", ""): 1,
        ("multisa_images_in_flight", ""): 4,
    }
    assert found.items() >= expected.items()
    assert found[("multisa_images_per_second", "")] > 0
    assert found[("process_resident_memory_bytes", "")] > 1e6 or not Path("/proc/self/statm").exists()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["multisa_images_done"].type == "counter" and families["multisa_queue_depth"].type == "gauge"
    assert all(family.documentation for family in families.values())


@pytest.mark.parametrize(
    ("command", "stages"),
    [
        ("label", {"read", "decode", "cam", "affinity", "walk", "crf", "encode", "commit"}),
        ("segment", {"read", "decode", "segmenter", "encode", "commit"}),
    ],
)
def test_counters_are_there_before_they_count(
    command: str, stages: set[str], photos: Path, bundle: Bundle, tmp_path: Path
) -> None:
    """Each at 0, and a run adds no others."""
    kinds = {"read", "decode", "predict", "postprocess", "encode", "process"}
    with Telemetry(metrics_port=0) as telemetry:
        telemetry.run_started(command, images=10)
        before = samples(scrape(telemetry.metrics_port))
        telemetry.stage_busy("decode", 0.5)  # what was counted is kept
        telemetry.run_started(command, images=10)
        assert samples(scrape(telemetry.metrics_port))[("multisa_stage_busy_seconds_total", "decode")] == 0.5
    counters = {key: value for key, value in before.items() if key[1]}
    assert counters == {
        **{("multisa_images_failed_total", kind): 0 for kind in kinds},
        **{("multisa_stage_busy_seconds_total", stage): 0 for stage in stages},
    }
    telemetry = Telemetry()
    run(
        make_job(command, str(photos), tmp_path / "out", bundle.path, BackendRequest(), RunOptions()),
        RunOptions(),
        LocalExecutor,
        telemetry=telemetry,
    )
    registry = CollectorRegistry()
    registry.register(telemetry)
    after = samples(generate_latest(registry).decode())
    assert {key for key in after if key[1] and key[0] != "multisa_queue_depth"} == set(counters)
    assert after[("multisa_images_failed_total", "decode")] == 1
    assert all(after[("multisa_stage_busy_seconds_total", stage)] > 0 for stage in stages)


def test_labels_are_escaped() -> None:
    odd = 'a"b\\n\\c\nd}'
    with Telemetry(metrics_port=0) as telemetry:
        telemetry.image_failed("a", "broken", odd)
        assert samples(scrape(telemetry.metrics_port))[("multisa_images_failed_total", odd)] == 1


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"on 127\.0\.0\.1:{port}: .*--metrics-port"):
            Telemetry(metrics_port=port).__enter__()
    with pytest.raises(UsageError, match="got 70000 as the port"):
        Telemetry(metrics_port=70000).__enter__()


def test_metrics_without_prometheus_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(BackendUnavailable, match=r'not installed: pip install "multisa\[metrics\]"'):
        Telemetry(metrics_port=0).__enter__()


def test_a_log_is_closed_when_the_port_cannot_be_had(tmp_path: Path) -> None:
    handlers = log.handlers[:]
    before = open_descriptors()
    with pytest.raises(UsageError):
        Telemetry(log_json=str(tmp_path / "log.jsonl"), metrics_port=-1).__enter__()
    assert open_descriptors() == before and log.handlers == handlers


def test_nothing_is_opened_before_telemetry_is_entered(tmp_path: Path) -> None:
    before = open_descriptors()
    telemetry = Telemetry(log_json=str(tmp_path / "log.jsonl"), metrics_port=0)
    telemetry.run_started("segment", images=1)
    assert open_descriptors() == before and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["bundle", "labels", "output"])
def test_a_run_that_cannot_start_closes_log_and_port(photos: Path, bundle: Bundle, tmp_path: Path, wrong: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    output = photos if wrong == "output" else tmp_path / "out"
    labels = tmp_path / "none.csv" if wrong == "labels" else None
    folder = tmp_path / "none" if wrong == "bundle" else bundle.path
    job = make_job("segment", str(photos), output, folder, BackendRequest(), RunOptions())
    handlers, threads = log.handlers[:], threading.active_count()
    for _ in range(2):  # the second time the port must be free again
        telemetry = Telemetry(str(tmp_path / "log.jsonl"), metrics_port=port)
        with pytest.raises((MultisaError, OSError)):
            run(job, RunOptions(), LocalExecutor, labels=labels, telemetry=telemetry)
    assert log.handlers == handlers and threading.active_count() == threads
    socket.create_server(("127.0.0.1", port)).close()


def open_descriptors() -> int:
    folder = Path("/proc/self/fd")
    if not folder.exists():
        pytest.skip("needs /proc")
    return len(list(folder.iterdir()))


def test_messages_are_events_of_a_log_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.jsonl"
    with Telemetry(log_json=str(path)):
        log.warning("low on memory")
    log.warning("not of this run")
    (message,) = events(path)
    assert (message["level"], message["event"], message["message"]) == ("warning", "message", "low on memory")
    assert capsys.readouterr().err == "low on memory\nnot of this run\n"


def test_threads_lose_no_count() -> None:
    telemetry = Telemetry()

    def work() -> None:
        for _ in range(500):
            telemetry.images_done()
            telemetry.stage_busy("decode", 1.0)
            telemetry.image_failed("a", "b", "ImageError")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    registry = CollectorRegistry()
    registry.register(telemetry)
    found = samples(generate_latest(registry).decode())
    assert found[("multisa_images_done_total", "")] == 2000
    assert found[("multisa_stage_busy_seconds_total", "decode")] == 2000
    assert found[("multisa_images_failed_total", "ImageError")] == 2000
