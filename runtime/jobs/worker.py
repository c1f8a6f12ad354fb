"""All that does shards in one process: the source, the engines, the sinks and the pipeline between them."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from multisa.runtime.backends.registry import SelectedBackend
from multisa.runtime.bundle import load_bundle
from multisa.runtime.jobs.encoder import Encoder, json_line
from multisa.runtime.jobs.fingerprint import identity
from multisa.runtime.jobs.journal import ShardResult
from multisa.runtime.jobs.pipeline import CompletedShard, Pipeline
from multisa.runtime.jobs.shards import ShardFolder
from multisa.runtime.jobs.snapshot import Shard
from multisa.runtime.jobs.spec import Job
from multisa.runtime.jobs.stages import Failure, RunObserver
from multisa.runtime.predict.prediction import StageTimer
from multisa.runtime.writers.base import Writer

RECORDS, FAILURES = "records", "failures"  # parts of a shard


class Worker:
    """Does shards of a job; a context manager."""

    def __init__(self, job: Job, watcher: RunObserver) -> None:
        """Open everything. Raises what opening the bundle, its engines, the source and the sinks raises."""
        self.job = job
        self.timer = StageTimer(watcher.stage_busy)
        with ExitStack() as stack:
            bundle = load_bundle(job.bundle)
            self.source = stack.enter_context(job.open_source())
            predictor = stack.enter_context(job.open_predictor(bundle))
            self.backends: Sequence[SelectedBackend] = predictor.backends
            self._device = predictor.device
            self.writers: Sequence[Writer] = job.open_writers(bundle)
            self._pipeline = stack.enter_context(
                Pipeline(
                    predictor,
                    self.source,
                    Encoder(job.out, self.writers),
                    sizes=job.sizes,
                    timer=self.timer,
                    watcher=watcher,
                    max_pixels=job.max_pixels,
                )
            )
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, traceback)

    def start(
        self, shard: Shard, committed: Callable[[ShardResult], None], *, guard: str = ""
    ) -> Future[None]:
        """Do a shard and write it; returns once all its images are under way.

        `committed` is called, in the thread that writes, when all files have their names. guard: see
        ShardFolder.
        """

        def commit(done: CompletedShard) -> None:
            committed(self._write(done, guard))

        return self._pipeline.submit(shard, commit)

    def run_isolated(
        self,
        shard: Shard,
        committed: Callable[[ShardResult], None],
        *,
        failures: Sequence[Failure],
        begin: Callable[[int], object],
        guard: str = "",
    ) -> None:
        """Do a shard of which an image may end this process: `begin` is told which one is in hand, or -1.

        failures: of images that are not tried. An engine gets the images one by one, whatever the batch is.
        """
        left_out = {failure.index for failure in failures}
        parts: list[CompletedShard] = []
        for work in shard.works:
            if work.index not in left_out:
                begin(work.index)
                self.wait(self._pipeline.submit(Shard(shard.number, (work,)), parts.append))
        begin(-1)
        images = [image for part in parts for image in part.images]
        failed = [*failures, *(failure for part in parts for failure in part.failures)]
        failed.sort(key=lambda failure: failure.index)
        committed(self._write(CompletedShard(shard, images, failed), guard))

    def identity(self) -> Mapping[str, Any]:
        """Engines and versions, as the settings of a run hold them."""
        return {**identity(self.backends), "masks are made on": self._device}

    def wait(self, future: "Future[None]") -> None:
        """Wait for a shard. Raises what has kept it from being done."""
        self._pipeline.wait(future)

    def _write(self, done: CompletedShard, guard: str) -> ShardResult:
        number = done.shard.number
        failures = (
            {"index": f.index, "image": f.image, "kind": f.kind, "reason": f.reason} for f in done.failures
        )
        with ShardFolder(self.job.out, number, guard) as files:
            for position, writer in enumerate(self.writers):
                writer.write_shard(files, number, [image.payloads[position] for image in done.images])
            files.write_part(RECORDS, b"".join(image.record for image in done.images))
            files.write_part(FAILURES, b"".join(map(json_line, failures)))
            size, digest = files.commit()
        return ShardResult(number, len(done.images), len(done.failures), size, digest)
