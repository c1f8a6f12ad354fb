"""The stage "kernels": the subjects' own comparisons, a row for each way."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from multisa.benchmarks.suite.guest import INSTALL
from multisa.benchmarks.suite.setting import Setting
from multisa.runtime.progress import Progress, log

Row = dict[str, Any]
OURS = "multisa"


def measure(setting: Setting) -> list[Row]:
    """Rows of the random walk and the dense CRF: ours, and what the literature runs.

    A subject whose packages are not there is a row with the reason as "problem".
    """
    quick = setting.effort.is_quick
    rows: list[Row] = []
    subjects: dict[str, Callable[[bool], Iterator[Row]]] = {"random walk": _walk, "dense CRF": _crf}
    with Progress(len(subjects), "kernels", "subject") as bar:
        for name, subject in subjects.items():
            try:
                rows += list(subject(quick))
            except ImportError as error:  # of SciPy, or what the CRF says of pydensecrf
                missing = f"{error.name} is not installed" if error.name else str(error)
                problem = f"{missing}: {INSTALL}"
                rows.append({"kernel": name, "way": "", "problem": problem})
                log.info(f"{name}: left out: {problem}")
            bar.advance()
    return rows


def _walk(quick: bool) -> Iterator[Row]:
    from multisa.benchmarks import random_walk

    for compared in random_walk.comparisons(quick=quick):
        size = f"{compared['size']}x{compared['size']}, {compared['channels']} channels"
        floor = compared["floor"]
        yield from _ways("random walk", size, compared["ways"], floor["binding"])


def _crf(quick: bool) -> Iterator[Row]:
    from multisa.benchmarks import dense_crf

    for compared in dense_crf.comparisons(quick=quick):
        shape = f"{dense_crf.WIDTH}x{dense_crf.HEIGHT}, {compared['parameters']}"
        size = f"{shape}, {compared['labels']} labels, {compared['present']} present"
        floor = compared["floor"]
        limit = {
            "floor_ms": floor["floor_ms"],
            "share": floor["share_of_floor"],
            "text": "bytes of the lattice read once an iteration, over the measured bandwidth of a copy",
        }
        yield from _ways("dense CRF", size, compared["ways"], limit)


def _ways(kernel: str, size: str, ways: Mapping[str, Mapping[str, Any]], limit: Row) -> Iterator[Row]:
    ours = ways[OURS]["median_ms"]
    for way, figures in ways.items():
        yield {
            "kernel": kernel,
            "way": way,
            "size": size,
            "threads": "all" if way.startswith("dense squaring") else 1,
            "problem": None,
            **figures,
            "times_ours": round(figures["median_ms"] / ours, 3),
            "limit": limit if way == OURS else None,
        }
