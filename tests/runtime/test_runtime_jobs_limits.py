"""What fails an image and what fails the run: engines that are broken, memory that is short, large files."""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipeline_parts import SHAPES, Images, Predictor, RunObserver, contents, pipeline_of, run_shards, shard_of

from multisa.runtime.bundle.manifest import Manifest
from multisa.runtime.errors import BackendError, BackendUnavailable
from multisa.runtime.imaging.decode import DecodedImage
from multisa.runtime.jobs import pipeline as pipeline_module
from multisa.runtime.jobs.snapshot import Shard
from multisa.runtime.jobs.stages import MAX_CONSECUTIVE_FAILURES, PipelineConfig, StopSignal, WeightedSemaphore
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
    observer = RunObserver()
    config = PipelineConfig(readers=2, workers=2, batch=batch)
    source = Images(shapes=SHAPES[:1])
    with (
        pytest.raises(BackendUnavailable, match=r"the device is lost .* before it\): check the device") as seen,
        pipeline_of(tmp_path, manifest, source, Breaks(), observer, config) as pipeline,
    ):
        run_shards(pipeline, [shard_of(n, range(n * 50, n * 50 + 50)) for n in range(8)])
    assert len(observer.failed) < MAX_CONSECUTIVE_FAILURES
    assert seen.value.exit_code == 5


def test_an_engine_is_asked_twice(tmp_path: Path, manifest: Manifest) -> None:
    class Short(Predictor):
        """Memory is short now and then."""

        def predict_batch(self, images: np.ndarray, *arguments: Any) -> Sequence[Any]:
            found = super().predict_batch(images, *arguments)
            if len(self.batches) % 2:
                raise BackendError("out of memory")
            return found

    observer = RunObserver()
    with pipeline_of(tmp_path, manifest, Images(), Short(), observer, PipelineConfig(1, 1)) as pipeline:
        run_shards(pipeline, [shard_of(0, range(20))])
    assert len(observer.done) == 20 and not observer.failed


def test_images_that_are_refused_now_and_then_end_no_run(tmp_path: Path, manifest: Manifest) -> None:
    predictor, observer = Predictor(refused=frozenset(range(0, 100, 2))), RunObserver()
    with pipeline_of(tmp_path, manifest, Images(), predictor, observer) as pipeline:
        run_shards(pipeline, [shard_of(0, range(100))])
    assert len(observer.failed) == 50


@pytest.mark.parametrize("batch", [1, 4])
def test_a_second_attempt_is_logged(
    tmp_path: Path, manifest: Manifest, batch: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config = PipelineConfig(readers=1, workers=1, batch=batch)
    predictor = Predictor(refused=frozenset({2}))
    with pipeline_of(tmp_path, manifest, Images(shapes=SHAPES[:1]), predictor, config=config) as pipeline:
        run_shards(pipeline, [shard_of(0, range(4))])
    logged = capsys.readouterr().err
    assert logged.count("00002.png: trying a second time: cannot be run on [2]") == 1
    text = "a batch of 4 images failed, trying one by one: cannot be run on [0, 1, 2, 3]"
    assert logged.count(text) == (batch > 1)


@pytest.mark.parametrize("stage", ["read", "decode", "predict", "postprocess", "encode"])
def test_memory_that_is_short_fails_the_image(
    tmp_path: Path, manifest: Manifest, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = MemoryError("Unable to allocate 9 GiB")
    decoded = iter(range(100))

    class Hungry(Predictor):
        def decode(self, data: bytes, *, max_pixels: int) -> DecodedImage:
            if next(decoded) == 2 and stage == "decode":
                raise short
            return super().decode(data, max_pixels=max_pixels)

        def postprocess(self, raw: int, *arguments: Any) -> Prediction:
            if stage == "postprocess" and raw == 2:
                raise short
            return super().postprocess(raw, *arguments)

    if stage == "encode":
        real = pipeline_module.check_path_length

        def hungry(output: Path, relative: str) -> None:
            if relative.endswith("00002.png"):
                raise short
            real(output, relative)

        monkeypatch.setattr(pipeline_module, "check_path_length", hungry)
    source = Images(frozenset({2}) if stage == "read" else frozenset(), error=short)  # type: ignore[arg-type]
    predictor = Hungry(frozenset({2}) if stage == "predict" else frozenset(), predict_error=short)
    with pipeline_of(tmp_path, manifest, source, predictor, config=PipelineConfig(1, 1)) as pipeline:
        ((_, images, failures),) = contents(run_shards(pipeline, [shard_of(0, range(6))]))
    assert [index for index, *_ in images] == [0, 1, 3, 4, 5]
    assert [(f.index, f.kind, f.reason) for f in failures] == [
        (2, stage, "not enough memory for it: Unable to allocate 9 GiB")
    ]


def test_the_bytes_that_wait_to_be_decoded_are_bounded(tmp_path: Path, manifest: Manifest) -> None:
    size, most, held = 1000, 0, 0
    lock = threading.Lock()

    class Large(Images):
        def read(self, item: Any) -> bytes:
            nonlocal held, most
            with lock:
                held += size
                most = max(most, held)
            return super().read(item).ljust(size, b"\0")

    class Slow(Predictor):
        def decode(self, data: bytes, *, max_pixels: int) -> DecodedImage:
            nonlocal held
            time.sleep(0.003)
            with lock:
                held -= size
            return super().decode(data, max_pixels=max_pixels)

    samples = [replace(sample, item=replace(sample.item, size=size)) for sample in shard_of(0, range(60)).samples]
    observer, config = RunObserver(), PipelineConfig(readers=6, workers=2, max_raw_bytes=3 * size)
    with pipeline_of(tmp_path, manifest, Large(broken=frozenset({7})), Slow(), observer, config) as pipeline:
        run_shards(pipeline, [Shard(0, tuple(samples))])
    assert len(observer.done) == 59
    assert most <= 3 * size


def test_a_file_larger_than_the_limit_is_admitted_alone() -> None:
    semaphore = WeightedSemaphore(10, StopSignal())
    semaphore.acquire(25)
    waits = threading.Thread(target=semaphore.acquire, args=(1,), daemon=True)
    waits.start()
    waits.join(0.3)
    assert waits.is_alive()
    semaphore.release(25)
    waits.join(20)
    assert not waits.is_alive()


def test_stopping_wakes_those_that_wait() -> None:
    stop = StopSignal()
    semaphore = WeightedSemaphore(10, stop)
    semaphore.acquire(10)
    threading.Timer(0.1, stop.set).start()
    semaphore.acquire(10)


def test_each_thread_raises_its_own_copy_of_an_error() -> None:
    for error in (OSError(28, "full", "/disk"), BackendUnavailable("lost", remedy="check"), KeyError("bug")):
        stop = StopSignal()
        stop.set(error)
        stop.set(ValueError("a later one"))
        first, second = stop.error(), stop.error()
        assert first is not second and first is not error and second.__cause__ is error
        assert type(first) is type(error) and str(first) == str(error)
        assert first.__traceback__ is None


def test_an_error_that_cannot_be_copied_ends_the_run_too(tmp_path: Path, manifest: Manifest) -> None:
    class OddError(Exception):
        def __init__(self, code: int, text: str) -> None:
            super().__init__(f"{code}: {text}")

    predictor = Predictor(frozenset({3}), OddError(7, "a bug"))
    with (
        pytest.raises(RuntimeError, match="OddError: 7: a bug"),
        pipeline_of(tmp_path, manifest, Images(), predictor) as pipeline,
    ):
        run_shards(pipeline, [shard_of(0, range(8))])
