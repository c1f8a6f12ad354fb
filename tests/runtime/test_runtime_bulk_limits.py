"""What fails an image and what fails the run: engines that are broken, memory that is short, large files."""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipeline_parts import SHAPES, Images, Predictor, RunObserver, contents, do, pipeline_of, shard_of

from multisa.runtime.bundle.manifest import Manifest
from multisa.runtime.errors import BackendError, BackendUnavailable
from multisa.runtime.jobs.snapshot import Shard
from multisa.runtime.jobs.stages import MAX_REFUSED, ByteSemaphore, PipelineConfig
from multisa.runtime.predict.prediction import Prediction


class Breaks(Predictor):
    """Runs so many times, and never again."""

    runs = 30

    def predict_batch(self, images: np.ndarray, *arguments: Any) -> Sequence[Any]:
        if len(self.batches) >= self.runs:
            raise BackendError("segmenter: cannot be run: the device is lost")
        return super().predict_batch(images, *arguments)


@pytest.mark.parametrize("batch", [1, 4])
def test_an_engine_that_is_broken_ends_the_run(tmp_path: Path, manifest: Manifest, batch: int) -> None:
    watcher = RunObserver()
    sizes = PipelineConfig(readers=2, workers=2, batch=batch)
    source = Images(shapes=SHAPES[:1])
    with (
        pytest.raises(
            BackendUnavailable, match=r"the device is lost .* before it\): see to the device"
        ) as seen,
        pipeline_of(tmp_path, manifest, source, Breaks(), watcher, sizes) as pipeline,
    ):
        do(pipeline, [shard_of(n, range(n * 50, n * 50 + 50)) for n in range(8)])
    assert len(watcher.failed) < MAX_REFUSED
    assert seen.value.exit_code == 5


def test_an_engine_is_asked_twice(tmp_path: Path, manifest: Manifest) -> None:
    class Short(Predictor):
        """Memory is short now and then."""

        def predict_batch(self, images: np.ndarray, *arguments: Any) -> Sequence[Any]:
            found = super().predict_batch(images, *arguments)
            if len(self.batches) % 2:
                raise BackendError("out of memory")
            return found

    watcher = RunObserver()
    with pipeline_of(tmp_path, manifest, Images(), Short(), watcher, PipelineConfig(1, 1)) as pipeline:
        do(pipeline, [shard_of(0, range(20))])
    assert len(watcher.done) == 20 and not watcher.failed


def test_images_that_are_refused_now_and_then_end_no_run(tmp_path: Path, manifest: Manifest) -> None:
    method, watcher = Predictor(refused=frozenset(range(0, 100, 2))), RunObserver()
    with pipeline_of(tmp_path, manifest, Images(), method, watcher) as pipeline:
        do(pipeline, [shard_of(0, range(100))])
    assert len(watcher.failed) == 50


@pytest.mark.parametrize("stage", ["read", "decode", "infer", "refine", "encode"])
def test_memory_that_is_short_fails_the_image(
    tmp_path: Path, manifest: Manifest, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = MemoryError("Unable to allocate 9 GiB")

    class Hungry(Predictor):
        def postprocess(self, inferred: int, *arguments: Any) -> Prediction:
            if stage == "refine" and inferred == 2:
                raise short
            return super().postprocess(inferred, *arguments)

    def fail_at(module: str, name: str, is_it: Any) -> None:
        real = getattr(__import__(module, fromlist=[name]), name)

        def hungry(*arguments: Any, **options: Any) -> Any:
            if is_it(*arguments):
                raise short
            return real(*arguments, **options)

        monkeypatch.setattr(f"{module}.{name}", hungry)

    calls = iter(range(100))
    if stage == "decode":
        fail_at("multisa.runtime.jobs.pipeline", "decode_working_image", lambda _: next(calls) == 2)
    if stage == "encode":
        fail_at("multisa.runtime.jobs.worker", "uncertainty", lambda *_: next(calls) == 2)
    source = Images(frozenset({2}) if stage == "read" else frozenset(), error=short)  # type: ignore[arg-type]
    method = Hungry(frozenset({2}) if stage == "infer" else frozenset(), infer_error=short)
    with pipeline_of(tmp_path, manifest, source, method, sizes=PipelineConfig(1, 1)) as pipeline:
        ((_, images, failures),) = contents(do(pipeline, [shard_of(0, range(6))]))
    assert [index for index, *_ in images] == [0, 1, 3, 4, 5]
    assert [(f.index, f.kind, f.reason) for f in failures] == [
        (2, stage, "not enough memory for it: Unable to allocate 9 GiB")
    ]


def test_the_bytes_that_wait_to_be_decoded_are_bounded(
    tmp_path: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from multisa.runtime.jobs import pipeline as pipeline_module

    size, most, held = 1000, 0, 0
    lock, decode = threading.Lock(), pipeline_module.decode_working_image

    class Large(Images):
        def read(self, item: Any) -> bytes:
            nonlocal held, most
            with lock:
                held += size
                most = max(most, held)
            return super().read(item).ljust(size, b"\0")

    def slow(*arguments: Any, **options: Any) -> Any:
        nonlocal held
        time.sleep(0.003)
        with lock:
            held -= size
        return decode(*arguments, **options)

    monkeypatch.setattr(pipeline_module, "decode_working_image", slow)
    works = [replace(work, item=replace(work.item, size=size)) for work in shard_of(0, range(60)).works]
    watcher, sizes = RunObserver(), PipelineConfig(readers=6, workers=2, raw_bytes=3 * size)
    with pipeline_of(
        tmp_path, manifest, Large(broken=frozenset({7})), Predictor(), watcher, sizes
    ) as pipeline:
        do(pipeline, [Shard(0, tuple(works))])
    assert len(watcher.done) == 59
    assert most <= 3 * size


def test_a_file_larger_than_the_budget_goes_alone() -> None:
    budget = ByteSemaphore(10, threading.Event())
    budget.take(25)
    waits = threading.Thread(target=budget.take, args=(1,), daemon=True)
    waits.start()
    waits.join(0.3)
    assert waits.is_alive()
    budget.change(-25)
    waits.join(20)
    assert not waits.is_alive()


def test_who_waits_for_bytes_hears_of_the_end_of_the_run() -> None:
    stopped = threading.Event()
    budget = ByteSemaphore(10, stopped)
    budget.take(10)
    threading.Timer(0.1, stopped.set).start()
    budget.take(10)
