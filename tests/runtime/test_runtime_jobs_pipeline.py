"""The stages side by side: the same answer whatever their widths, bounded, and no hang whatever is raised."""

import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from pipeline_parts import (
    SHAPES,
    SOON,
    Images,
    Predictor,
    RunObserver,
    by_number,
    contents,
    pipeline_of,
    run_shards,
    shard_of,
)

from multisa.runtime.bundle.manifest import Manifest
from multisa.runtime.errors import MultisaError
from multisa.runtime.jobs.pipeline import CompletedShard
from multisa.runtime.jobs.stages import Failure, PipelineConfig
from multisa.runtime.predict.prediction import Prediction
from multisa.runtime.sources.base import SourceItem


def test_the_same_for_any_widths(tmp_path: Path, manifest: Manifest) -> None:
    shards = [shard_of(n, range(first, first + 9)) for n, first in enumerate(range(0, 45, 9))]
    found = []
    for readers, workers in ((1, 1), (4, 1), (1, 4), (3, 3)):
        source, observer = Images(frozenset({3}), frozenset({13, 14})), RunObserver()
        config = PipelineConfig(readers, workers, batch=3, look_ahead=5)
        with pipeline_of(tmp_path, manifest, source, Predictor(frozenset({20})), observer, config) as pipeline:
            found.append(contents(run_shards(pipeline, shards)))
        assert sorted(observer.done) == [i for i in range(45) if i not in (3, 13, 14, 20)]
    assert found[0] == found[1] == found[2] == found[3]
    failures = {failure.index: failure.kind for _, _, some in found[0] for failure in some}
    assert failures == {3: "read", 13: "decode", 14: "decode", 20: "predict"}
    assert [index for _, images, _ in found[0] for index, _, _ in images] == sorted(observer.done)


def test_which_images_an_engine_gets_together(tmp_path: Path, manifest: Manifest) -> None:
    """Full groups, then the one that waits longest, and what is left at the end of the shard."""
    order = [0, 1, 4, 8, 2, 5, 6, 3, 12, 9]  # of the shapes 0 1 0 0 2 1 2 3 0 1
    expected = [[0, 4, 8], [1, 5], [2, 6], [3], [12], [9]]
    for workers in (1, 3):
        predictor = Predictor()
        config = PipelineConfig(readers=2, workers=workers, batch=3, look_ahead=4)
        with pipeline_of(tmp_path, manifest, Images(), predictor, config=config) as pipeline:
            run_shards(pipeline, [shard_of(0, order), shard_of(1, [16, 17])])
        batches = predictor.batches if workers == 1 else sorted(predictor.batches)
        wanted = [*expected, [16], [17]]  # never an image of the next shard
        assert batches == (wanted if workers == 1 else sorted(wanted))


@pytest.mark.parametrize("batch", [1, 4])
def test_one_bad_image_does_not_fail_its_neighbours(tmp_path: Path, manifest: Manifest, batch: int) -> None:
    source, predictor = Images(shapes=SHAPES[:1]), Predictor(refused=frozenset({2}))
    config = PipelineConfig(readers=1, workers=2, batch=batch)
    with pipeline_of(tmp_path, manifest, source, predictor, config=config) as pipeline:
        ((_, images, failures),) = contents(run_shards(pipeline, [shard_of(0, range(8))]))
    assert [index for index, *_ in images] == [0, 1, 3, 4, 5, 6, 7]
    assert failures == [Failure(2, "00002.png", "predict", "cannot be run on [2]")]


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("look_ahead", [1, 2, 7])
def test_tiny_permits_never_lock(tmp_path: Path, manifest: Manifest, batch: int, look_ahead: int) -> None:
    config = PipelineConfig(readers=1, workers=1, batch=batch, look_ahead=look_ahead)
    sizes_of_shards = (1, 2, 9, 0, 30, 3, 17)
    first = 0
    shards = []
    for number, size in enumerate(sizes_of_shards):
        shards.append(shard_of(number, range(first, first + size)))
        first += size
    source = Images(unreadable=frozenset(range(4, 40, 3)), broken=frozenset(range(5, 40, 3)))
    with pipeline_of(tmp_path, manifest, source, Predictor(), config=config) as pipeline:
        done = run_shards(pipeline, shards)
    assert [len(one.images) + len(one.failures) for one in sorted(done, key=by_number)] == list(sizes_of_shards)


def test_no_more_is_under_way_than_there_are_permits(tmp_path: Path, manifest: Manifest) -> None:
    observer, most, reads = RunObserver(), 0, 0
    lock = threading.Lock()

    def read_now() -> None:
        nonlocal most, reads
        with lock:
            reads += 1
            most = max(most, reads - len(observer.done))

    class Slow(Predictor):
        def postprocess(self, *arguments: Any) -> Prediction:
            time.sleep(0.003)
            return super().postprocess(*arguments)

    config = PipelineConfig(readers=2, workers=2)
    source = Images(read_now=read_now)
    with pipeline_of(tmp_path, manifest, source, Slow(), observer, config) as pipeline:
        run_shards(pipeline, [shard_of(n, range(n * 50, n * 50 + 50)) for n in range(2)])
    assert 2 < most <= config.max_in_flight
    assert 2 < observer.most <= config.max_in_flight


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, manifest: Manifest) -> None:
    height, width, config = 300, 400, PipelineConfig(readers=2, workers=2)
    peaks = []
    for shards in (2, 20):  # the first only warms up
        source = Images(shapes=((height, width),))
        with pipeline_of(tmp_path, manifest, source, Predictor(), config=config) as pipeline:
            tracemalloc.start()
            waiting = [pipeline.submit(shard_of(n, range(n * 12, n * 12 + 12)), lambda _: None) for n in range(2)]
            for n in range(2, shards):
                waiting.append(pipeline.submit(shard_of(n, range(n * 12, n * 12 + 12)), lambda _: None))
                waiting.pop(0).result(SOON)
            for future in waiting:
                future.result(SOON)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[1] < 2 * config.max_in_flight * 3 * height * width  # 240 images in all


class BadWatcher(RunObserver):
    """One whose terminal is gone."""

    def image_failed(self, failure: Failure) -> None:
        raise BrokenPipeError(32, "Broken pipe")


NONE: frozenset[int] = frozenset()
SOME = frozenset({30})


@pytest.mark.parametrize(
    ("source", "predictor", "observer", "error"),
    [
        (Images(SOME, error=RuntimeError("a bug")), Predictor(), RunObserver(), RuntimeError),
        (Images(), Predictor(SOME, ZeroDivisionError("a bug")), RunObserver(), ZeroDivisionError),
        (Images(), Predictor(postprocess_error=KeyError("a bug")), RunObserver(), KeyError),
        (Images(SOME), Predictor(), BadWatcher(), BrokenPipeError),  # raised while batches are made
        (Images(NONE, SOME), Predictor(), BadWatcher(), BrokenPipeError),
        (Images(), Predictor(SOME), BadWatcher(), BrokenPipeError),
    ],
    ids=["read", "predict", "postprocess", "monitor-read", "monitor-decode", "monitor-infer"],
)
def test_what_is_raised_unexpectedly_ends_the_run(
    tmp_path: Path, manifest: Manifest, source: Any, predictor: Any, observer: Any, error: type[Exception]
) -> None:
    start = time.monotonic()
    with pytest.raises(error), pipeline_of(tmp_path, manifest, source, predictor, observer) as pipeline:
        run_shards(pipeline, [shard_of(n, range(n * 20, n * 20 + 20)) for n in range(20)])
    assert time.monotonic() - start < SOON
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("multisa-")]


def test_a_shard_that_cannot_be_written_ends_the_run(tmp_path: Path, manifest: Manifest) -> None:
    def commit(done: CompletedShard) -> None:
        raise OSError(28, "No space left on device")

    with pipeline_of(tmp_path, manifest, Images(), Predictor()) as pipeline:
        first = pipeline.submit(shard_of(0, range(5)), commit)
        with pytest.raises(OSError, match="No space left"):
            first.result(SOON)
        with pytest.raises(OSError, match="No space left"):
            pipeline.submit(shard_of(1, range(5, 10)), commit)


def test_a_source_that_is_gone_ends_the_run(tmp_path: Path, manifest: Manifest) -> None:
    class Disk(Images):
        here = True

        def exists(self, item: SourceItem) -> bool:
            return self.here

    disk, observer = Disk(unreadable=frozenset({3, *range(10, 1000)})), RunObserver()
    with pipeline_of(tmp_path, manifest, disk, Predictor(), observer) as pipeline:
        (first,) = run_shards(pipeline, [shard_of(0, range(8))])
        assert [failure.index for failure in first.failures] == [3]  # the image alone was gone
        disk.here = False
        match = r"images of a test: .*can no longer be reached \(000\d\d\.png: not to be had\)"
        with pytest.raises(MultisaError, match=match):
            run_shards(pipeline, [shard_of(1, range(8, 1000))])
    assert [failure.index for failure in observer.failed] == [3]


def test_leaving_drops_what_is_queued(tmp_path: Path, manifest: Manifest) -> None:
    begun = threading.Event()

    class Slow(Predictor):
        def postprocess(self, *arguments: Any) -> Prediction:
            begun.set()
            time.sleep(0.05)
            return super().postprocess(*arguments)

    observer = RunObserver()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), pipeline_of(tmp_path, manifest, Images(), Slow(), observer) as pipeline:
        pipeline.submit(shard_of(0, range(12)), lambda _: None)
        assert begun.wait(SOON)
        raise KeyboardInterrupt
    assert len(observer.done) < 12 and time.monotonic() - start < SOON
