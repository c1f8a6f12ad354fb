"""TensorRT engines for GPUs that are not in this machine: sizes and build times.

    python benchmarks/engines.py [--bundle BUNDLE]      # the packaged bundle takes minutes

TensorRT-RTX builds the engines on the CPU; none is run, and no figure is of a GPU. --library tensorrt builds
for the GPU of this machine. Engines stay in --work, so that an interrupted run resumes from there. Each run
replaces its own rows in benchmarks/results/engines.json. A failure that is known is a row that says so; any
other ends the run with exit code 1.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from multisa.benchmarks.harness import environment, make_parser, save_results
from multisa.export.tensorrt.build import BuildOptions, build_engines
from multisa.export.tensorrt.builder import TURING_PRODUCT
from multisa.runtime.backends.base import CAM, CONTRACTS, PRECISIONS
from multisa.runtime.backends.registry import bundle_precisions
from multisa.runtime.backends.tensorrt_runtime import TENSORRT, TENSORRT_RTX
from multisa.runtime.bundle import Bundle, load_bundle
from multisa.runtime.errors import BackendError
from multisa.runtime.files import write_json_atomically
from multisa.runtime.progress import log

TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120")


def engine_rows(bundle: Bundle, options: BuildOptions) -> Iterator[dict[str, Any]]:
    """One row per target and graph that has the precision, as each is built."""
    for contract in CONTRACTS:
        if options.precision not in bundle_precisions(bundle, contract):
            continue
        for target in options.targets:
            names = {"graph": contract.name, "target": target, "precision": options.precision}
            cpu = time.process_time()
            report = build_engines(bundle, replace(options, targets=(target,), graphs=(contract.name,)))
            cpu = time.process_time() - cpu
            for failure in report.failures:
                # TensorRT-RTX cannot build cam for Turing in any precision.
                known = (contract.name, target) == (CAM.name, "sm75") and TURING_PRODUCT in failure
                yield {**names, "failure": failure, "known": known}
            for row in report.rows:
                yield {
                    **names,
                    "profiles": [str(profile) for profile in row.profiles],
                    "megabytes": round(row.bytes / 1e6, 2),
                    "build_seconds": round(row.build_seconds, 2),
                    "build_cpu_seconds": None if row.is_cached else round(cpu, 2),
                }


def main() -> None:
    """Build, and write the results after each engine."""
    parser = make_parser(__doc__, bundle=True)
    parser.add_argument("--work", type=Path, default=Path("build/engines"))
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="of the bundle's graphs")
    parser.add_argument("--library", default=TENSORRT_RTX, choices=(TENSORRT_RTX, TENSORRT))
    options = parser.parse_args()
    path = options.results / "engines.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    bundle = load_bundle(options.bundle)
    described = environment("torch", "onnxruntime", "tensorrt-rtx-cu13-libs")
    results |= described
    entry = {"graphs": {}, "engines": [], "load_average_at_start": described["load_at_start"]}
    # Other precisions and libraries have entries of their own.
    unusual = [text for text in (options.precision, options.library) if text not in ("fp32", TENSORRT_RTX)]
    results.setdefault("bundles", {})[", ".join((bundle.manifest.name, *unusual))] = entry
    requested = BuildOptions(
        tuple(options.targets.split(",")),
        precision=options.precision,
        library=options.library,
        engine_cache=options.work / "cache",
    )
    for row in engine_rows(bundle, requested):
        entry["engines"].append(row)
        log.info(json.dumps(row))
        write_json_atomically(path, results)  # an interrupted run keeps its rows
    save_results("engines", results, options.results)
    if any("failure" in row and not row["known"] for row in entry["engines"]):
        raise SystemExit(BackendError.exit_code)


if __name__ == "__main__":
    main()
