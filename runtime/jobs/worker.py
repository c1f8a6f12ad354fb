"""Everything that processes shards in one process: the source, the predictor, the writers, the pipeline."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

from multisa.runtime.bundle import load_bundle
from multisa.runtime.jobs.fingerprint import process_fingerprint
from multisa.runtime.jobs.journal import ShardResult
from multisa.runtime.jobs.monitor import RunMonitor
from multisa.runtime.jobs.pipeline import CompletedShard, Encoder, Pipeline, json_line
from multisa.runtime.jobs.shards import ShardFolder
from multisa.runtime.jobs.snapshot import Shard
from multisa.runtime.jobs.spec import Job
from multisa.runtime.jobs.stages import Concurrency, Failure, RunObserver
from multisa.runtime.predict.prediction import Predictor, StageTimer
from multisa.runtime.writers.base import Writer


class Executor(AbstractContextManager["Executor"], Protocol):
    """Processes shards; a context manager, which must be entered before anything else is called."""

    def fingerprint(self) -> Mapping[str, Any]:
        """What affects the bytes of the results and may differ between machines: backends and versions."""

    def backends(self) -> Mapping[str, Any]:
        """What runs each graph, for the record of a run."""

    def run(self, shards: Iterator[Shard], on_commit: Callable[[ShardResult], None]) -> None:
        """Process all `shards`; `on_commit` is called for each, from any thread, one call at a time."""

    def stage_seconds(self) -> Mapping[str, float]:
        """Seconds of work in each stage so far, summed over the threads."""

    def concurrency(self) -> Concurrency:
        """Threads of the stages and cores of the machines, of all worker processes."""


ExecutorFactory = Callable[[Job, RunMonitor], Executor]


RECORDS = "records"  # part of a shard: its lines of labels.jsonl
FAILURES = "failures"  # part of a shard: its lines of failed.jsonl


class Worker:
    """Processes shards of a job; see `open_worker`."""

    def __init__(
        self, job: Job, predictor: Predictor, writers: Sequence[Writer], pipeline: Pipeline, timer: StageTimer
    ) -> None:
        self.job = job
        self.timer = timer
        self.backends = predictor.backends
        self._predictor = predictor
        self._writers = writers
        self._pipeline = pipeline

    def start(self, shard: Shard, on_commit: Callable[[ShardResult], None], *, guard: str = "") -> Future[None]:
        """Start a shard; returns once all its images are in flight.

        `on_commit` is called, in the commit thread, when all files of the shard are in place. The future
        raises what kept the shard from being done. guard: see ShardFolder.
        """
        return self._pipeline.submit(shard, lambda done: on_commit(self._write(done, guard)))

    def run_isolated(
        self,
        shard: Shard,
        on_commit: Callable[[ShardResult], None],
        *,
        failures: Sequence[Failure],
        on_image: Callable[[int], object],
        guard: str = "",
    ) -> None:
        """Process a shard one image at a time, because one of its images may kill this process.

        failures: of images to leave out. `on_image` is called with the index of each image before it is
        processed, and with -1 after the last one.
        """
        left_out = {failure.index for failure in failures}
        parts: list[CompletedShard] = []
        for sample in shard.samples:
            if sample.index not in left_out:
                on_image(sample.index)
                self._pipeline.submit(Shard(shard.number, (sample,)), parts.append).result()
        on_image(-1)
        images = [image for part in parts for image in part.images]
        failed = [*failures, *(failure for part in parts for failure in part.failures)]
        failed.sort(key=lambda failure: failure.index)
        on_commit(self._write(CompletedShard(shard, images, failed), guard))

    def fingerprint(self) -> Mapping[str, Any]:
        """Backends, method, device and versions, as the settings of a run hold them."""
        return {
            **process_fingerprint(self.backends),
            "label method": self._predictor.method,
            "min area": self._predictor.min_area,
            "masks are made on": self._predictor.device,
        }

    def _write(self, done: CompletedShard, guard: str) -> ShardResult:
        number = done.shard.number
        failures = ({"index": f.index, "image": f.image, "kind": f.kind, "reason": f.reason} for f in done.failures)
        with ShardFolder(self.job.output, number, guard) as files:
            for position, writer in enumerate(self._writers):
                writer.write_shard(files, number, [image.payloads[position] for image in done.images])
            files.write_part(RECORDS, b"".join(image.record for image in done.images))
            files.write_part(FAILURES, b"".join(map(json_line, failures)))
            size, digest = files.commit()
        return ShardResult(number, len(done.images), len(done.failures), size, digest)


@contextmanager
def open_worker(job: Job, observer: RunObserver) -> Iterator[Worker]:
    """Open the bundle, its backends, the source and the writers. Raises what opening them raises."""
    timer = StageTimer(observer.stage_busy)
    with ExitStack() as stack:
        bundle = load_bundle(job.bundle)
        source = stack.enter_context(job.open_source())
        predictor = stack.enter_context(job.open_predictor(bundle))
        writers = job.open_writers(bundle)
        pipeline = Pipeline(
            predictor,
            source,
            Encoder(job.output, writers),
            config=job.pipeline,
            timer=timer,
            observer=observer,
            max_pixels=job.max_pixels,
        )
        yield Worker(job, predictor, writers, stack.enter_context(pipeline), timer)
