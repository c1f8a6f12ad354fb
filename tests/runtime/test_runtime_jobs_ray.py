"""Runs on a real Ray cluster of several processes: the bytes of one process, whatever dies."""

import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from executor_runs import IMAGES, SHARDS, descendants, disturbed, journalled, results, segment, title

from multisa.runtime.backends.registry import BackendRequest
from multisa.runtime.bundle import Bundle
from multisa.runtime.errors import BackendUnavailable, MultisaError, UsageError
from multisa.runtime.jobs.executors import ray as on_ray
from multisa.runtime.jobs.executors.ray import RayExecutor
from multisa.runtime.jobs.executors.worker import RemoteError
from multisa.runtime.jobs.monitor import RunMonitor
from multisa.runtime.jobs.spec import RunOptions, make_job

pytestmark = pytest.mark.slow

pytest.importorskip("ray", reason="needs the extra ray")

STORE = 80 << 20  # bytes of a node for Ray's objects, the least that it takes


class ThisCluster:
    """A head that takes no work, and nodes of one processor each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = self._cluster.address
        self.executor = partial(RayExecutor, address=self.address)
        self.nodes: list[Any] = []

    def have(self, nodes: int) -> None:
        """Add or remove nodes until there are so many."""
        while len(self.nodes) > nodes:
            self._cluster.remove_node(self.nodes.pop(), allow_graceful=False)
        while len(self.nodes) < nodes:
            self.nodes.append(self.add(1))

    def add(self, processors: int) -> Any:
        """One more node."""
        return self._cluster.add_node(num_cpus=processors, object_store_memory=STORE)

    def shutdown(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def started() -> Iterator[ThisCluster]:
    cluster = ThisCluster()
    yield cluster
    cluster.shutdown()


@pytest.fixture
def cluster(started: ThisCluster) -> ThisCluster:
    started.have(2)
    return started


def actors() -> list[int]:
    """Processes of the cluster that are actors of ours."""
    return [process for process in descendants(os.getpid()) if title(process).startswith("ray::ShardWorker")]


def test_a_cluster_writes_what_one_process_writes(
    cluster: ThisCluster,
    corpus: Path,
    bundle: Bundle,
    tmp_path: Path,
    alone: dict[str, bytes],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[int] = []
    executor = disturbed(cluster.executor, 1, lambda: seen.extend(actors()))
    capfd.readouterr()
    summary = segment(corpus, Path("on-ray"), bundle, executor)  # a path that the nodes would take for another
    assert results(tmp_path / "on-ray") == alone
    assert len(seen) == 2
    assert sorted(journalled(tmp_path / "on-ray")) == list(range(SHARDS))
    assert (summary.done_now, summary.failures, summary.failure_kinds) == (IMAGES - 3, 3, {"decode": 3})
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.count("segmenter: onnxruntime-cpu") == 1
    assert len(said.err.splitlines()) == 4  # that, and the failures: nothing of Ray's


def test_an_actor_that_is_killed_loses_nothing(
    cluster: ThisCluster,
    corpus: Path,
    bundle: Bundle,
    tmp_path: Path,
    alone: dict[str, bytes],
    capfd: pytest.CaptureFixture[str],
) -> None:
    executor = disturbed(cluster.executor, 3, lambda: os.kill(actors()[0], signal.SIGKILL))
    segment(corpus, tmp_path / "on-ray", bundle, executor)
    assert results(tmp_path / "on-ray") == alone
    assert sorted(journalled(tmp_path / "on-ray")) == list(range(SHARDS))
    assert "died" in capfd.readouterr().err
    assert not list((tmp_path / "on-ray/.multisa/tmp").glob("*"))


def test_an_error_where_a_shard_is_done_is_the_error_of_the_run(
    cluster: ThisCluster, corpus: Path, bundle: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/masks").write_text("a file where a folder is to be")
    with pytest.raises(FileExistsError) as raised:
        segment(corpus, tmp_path / "out", bundle, cluster.executor)
    assert raised.value.filename == str(tmp_path / "out/masks")
    with pytest.raises(BackendUnavailable, match="no NVIDIA driver"):
        segment(corpus, tmp_path / "other", bundle, cluster.executor, backend="onnxruntime-cuda")


def test_nodes_may_leave_and_join(
    cluster: ThisCluster,
    corpus: Path,
    bundle: Bundle,
    tmp_path: Path,
    alone: dict[str, bytes],
    capfd: pytest.CaptureFixture[str],
) -> None:
    """All nodes leave in the middle; another joins, and ends what they have begun."""

    def replace_all() -> None:
        cluster.have(0)
        end = time.monotonic() + 20
        while actors():  # they end when they notice that their node is no more
            assert time.monotonic() < end
            time.sleep(0.05)
        cluster.have(1)

    segment(corpus, tmp_path / "on-ray", bundle, disturbed(cluster.executor, 3, replace_all))
    assert results(tmp_path / "on-ray") == alone
    assert sorted(journalled(tmp_path / "on-ray")) == list(range(SHARDS))
    # One message for each actor; on a busy machine also for those that were to replace them and never ran.
    assert capfd.readouterr().err.count(" died") >= 2


def test_a_cluster_that_does_not_answer_is_said_at_once(corpus: Path, bundle: Bundle, tmp_path: Path) -> None:
    job = make_job("segment", str(corpus), tmp_path, bundle.path, BackendRequest(), RunOptions())
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    for address in (f"127.0.0.1:{free}", f"ray://127.0.0.1:{free}", "nowhere"):
        with (
            pytest.raises(MultisaError, match=r"cannot be reached .*ray start --head"),
            RunMonitor("segment") as monitor,
            RayExecutor(job, monitor, address),
        ):
            pass


def test_without_ray_it_is_said_how_to_install_it(
    corpus: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    job = make_job("segment", str(corpus), tmp_path, bundle.path, BackendRequest(), RunOptions())
    with pytest.raises(BackendUnavailable, match=r'ray is not installed: pip install "multisa\[ray\]"'):
        RayExecutor(job, RunMonitor("segment"), "auto")


def test_a_machine_that_others_use_joins(
    cluster: ThisCluster, corpus: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of its two processors is taken."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Other:
        """An actor of another program; sent as it is, as the cluster does not find this file."""

        def exists(self) -> bool:
            return True

    monkeypatch.setattr(on_ray, "_GIVE_UP_SECONDS", 15.0)
    node = cluster.add(2)
    cluster.have(0)  # now, as what is started on the nodes that leave is lost
    cluster.nodes.append(node)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        other = ray.remote(Other).options(num_cpus=1, scheduling_strategy=there).remote()
        ray.get(other.exists.remote())
        segment(corpus, tmp_path / "on-ray", bundle, cluster.executor)
        ray.kill(other)
    finally:
        ray.shutdown()
        cluster.have(0)
    assert sorted(journalled(tmp_path / "on-ray")) == list(range(SHARDS))


def test_variables_are_set_for_a_new_cluster_and_not_for_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONE", "mine")
    monkeypatch.delenv("TWO", raising=False)
    with on_ray._environment({"ONE": "ours", "TWO": "ours"}):
        assert (os.environ["ONE"], os.environ["TWO"]) == ("mine", "ours")
    assert os.environ["ONE"] == "mine" and "TWO" not in os.environ


def test_what_one_machine_cannot_do_others_may(corpus: Path, bundle: Bundle, tmp_path: Path) -> None:
    job = make_job("segment", str(corpus), tmp_path, bundle.path, BackendRequest(), RunOptions())
    executor = RayExecutor(job, RunMonitor("segment"), "auto")
    for error in (UsageError("another folder"), OSError(5, "Input/output error"), BackendUnavailable("lost")):
        assert executor._is_local_problem(RemoteError.of(error))
    try:
        int("a bug of ours")
    except ValueError as error:
        assert not executor._is_local_problem(RemoteError.of(error))
