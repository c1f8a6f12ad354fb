"""The README's results section from made-up files: of full runs, of quick ones, of other machines."""

import copy
from typing import Any

import pytest

from multisa.benchmarks import readme_bench, readme_graphs, readme_kernels, readme_results, start_up
from multisa.benchmarks.harness import environment
from multisa.benchmarks.random_walk import floor
from multisa.benchmarks.readme_sources import source

MACHINE = {"processor": "Made-up Processor", "cores": 2, "instruction_set": "avx2", "quick": False}
OTHER = MACHINE | {"processor": "Another Processor", "cores": 8}
SHA256 = "s"


def segment_row(engine: str, rate: float, **more: Any) -> dict[str, Any]:
    return {
        "engine": engine,
        "precision": "fp32",
        "device": "cpu",
        "default": False,
        "baseline": False,
        "problem": None,
        "images_per_second": rate,
        "end_to_end": {"images_per_second": [rate - 1, rate, rate + 1], "times_baseline": rate / 10},
        "loop": {"images_per_second": [rate, rate, rate], "times_baseline": 1.5},
        "latency_ms": {"p50": 40.0, "p90": 50.0, "p99": 61.0},
        "times_baseline": 2.5,
        "miou": 61.2,
        "label_agreement": 0.9998,
        "photographs": 223,
        "startup_seconds": 0.6,
        "peak_mib": {"host": 169.5, "device": None},
        "model_bytes": 6_600_000,
        "cores": [{"cores": 1, "images_per_second": 16.0}, {"cores": 2, "images_per_second": 30.0}],
        "limit": {"floor_ms": 12.0, "share": 0.3, "text": "multiply-adds over the peak"},
        **more,
    }


def files() -> dict[str, Any]:
    """Made up: of a full run, as far as the passages that are tested here read them."""
    suite = {"environment": MACHINE | {"bundle": {"sha256": SHA256}}}
    label = {
        "engine": "onnxruntime-cpu",
        "precision": "fp32",
        "device": "cpu",
        "recipe": "multisa label",
        "default": True,
        "problem": None,
        "images_per_second": 5.5,
        "default_times_as_fast": 1.0,
        "miou": 66.1,
        "label_agreement": 1.0,
        "photographs": 48,
        "stages_ms": {"cam": 100.0, "affinity": 20.0, "walk": 9.0, "crf": 40.0},
        "peak_mib": {"host": 700.0, "device": None},
        "mean_pixels": 180_000,
    }
    dense = {"recipe": "PyTorch eager, dense walk, pydensecrf", "default": False, "images_per_second": 0.02}
    times = {"median_ms": 2.0, "times_ours": 1.0, "max_error": 1e-5}
    ways = dict.fromkeys(("multisa", "scipy, Chebyshev", "dense squaring"), times)
    binding = {"floor_ms": 0.8, "share": 0.4, "text": "multiply-adds"}
    heads = {"lite0": {"ratio": 3.2}, "resnet50": {"ratio": 4.2}}
    cost = [{"scale": scale, "folded_over_unfolded": 0.5, "head_is_largest": False} for scale in (1.0, 2.0)]
    parts = {
        "head": heads,
        "cost": dict.fromkeys(("lite0", "resnet50", "resnest101"), cost),
        "whole": {name: {"ratio": 2.5, "size": 512} for name in ("lite0", "resnet50")},
        "memory": {"packaged": [{"peak_mib": 4662}, {"peak_mib": 793}]},
    }
    return {
        "voc-animals": {
            "rows": [{"measured_on": "train", "miou": 1.0}, {"measured_on": "val", "miou": 61.22}],
            "images": {"val": 223},
        },
        "segmenting": suite
        | {
            "segment": [
                segment_row("onnxruntime-cpu", 30.0, default=True),
                segment_row("pytorch-eager", 10.0, baseline=True),
                {"engine": "openvino", "problem": "openvino is not installed"},
            ]
        },
        "labelling": suite | {"label": [label, label | dense]},
        "start_up": {
            "environment": MACHINE,
            "ways": dict.fromkeys((start_up.OURS, start_up.EAGER_START), times),
            "limit": {"floor_ms": 100.0, "share": 0.2, "text": start_up.INTERPRETER},
        },
        "random_walk": {
            "environment": MACHINE,
            "comparisons": [
                {
                    "size": 64,
                    "channels": 4,
                    "ways": ways | {"dense squaring, denormals flushed": times},
                    "floor": {"binding": binding},
                }
            ],
        },
        "cam_head": {
            **{name: {"environment": MACHINE, "networks": networks} for name, networks in parts.items()},
            "scales": [0.5, 1.0],
        },
    }


def quick() -> dict[str, Any]:
    """Made up: the same as a quick run leaves it on another machine than the one of before."""
    made = copy.deepcopy(files())
    for name in ("segmenting", "labelling", "start_up", "random_walk"):
        made[name]["environment"]["quick"] = True
    for row in made["segmenting"]["segment"][:2]:
        row["latency_ms"]["p99"] = None
        row["photographs"] = 48
    del made["segmenting"]["segment"][0]["cores"], made["segmenting"]["segment"][0]["model_bytes"]
    for name in ("dense squaring", "dense squaring, denormals flushed"):
        del made["random_walk"]["comparisons"][0]["ways"][name]
    made["labelling"]["label"][1]["default_times_as_fast"] = None
    made["cam_head"]["head"]["environment"] = MACHINE | {"quick": True}
    for name in ("cost", "whole", "memory"):
        made["cam_head"][name]["environment"] = OTHER
    return made


def passages(made: dict[str, Any]) -> dict[str, str]:
    pieces = {
        "segmenting": [readme_bench.segmenting(made), *readme_bench.segmenting_conditions(made)],
        "labelling": [readme_bench.labelling(made), *readme_bench.labelling_conditions(made)],
        "start": readme_bench.start_up(made),
        "walk": readme_kernels.walk(made),
        "head": readme_graphs.head(made),
    }
    return {name: " ".join(some) for name, some in pieces.items()}


def test_full_files_need_no_remarks() -> None:
    said = passages(files())
    row = "| **onnxruntime-cpu** (default) | fp32 | 30.0 (3.00) | 30.0 (1.50) | 40, 50, 61 | 61.20 | 99.98% |"
    assert row in said["segmenting"] and "openvino" not in said["segmenting"]
    assert "2 cores segment 1.88 times as many as 1." in said["segmenting"]
    assert "squaring" in said["walk"] and "40% of what is taken" in said["walk"]
    assert all("quick" not in text and "another machine" not in text for text in said.values())


def test_quick_files_are_called_quick_and_lack_what_was_not_measured() -> None:
    said = passages(quick())
    assert "| 40, 50, - |" in said["segmenting"] and "cores segment" not in said["segmenting"]
    assert "squaring" not in said["walk"]
    assert "| 0.0200 | - |" in said["labelling"]
    assert all("a quick run" in text for text in said.values())
    elsewhere = "a quick run; cost: on 8 cores of another machine, Another Processor, AVX2; whole: on 8"
    assert f"(head: {elsewhere}" in said["head"]


def test_a_file_of_another_machine_says_so() -> None:
    made = files()
    assert source(made, "random_walk").endswith(")") and source(made, "random_walk").count("(") == 1
    made["random_walk"]["environment"] = OTHER
    assert source(made, "random_walk").endswith("(on 8 cores of another machine, Another Processor, AVX2)")
    made["plans"] = {**OTHER, "bundles": {}}  # beside what was measured, not below a key
    assert "Another Processor" in source(made, "plans")
    made["precisions"] = {"fp32": {"figures": {}}}
    assert (
        source(made, "precisions")
        == "[benchmarks/results/precisions.json](benchmarks/results/precisions.json)"
    )


def test_files_of_one_training_agree() -> None:
    assert readme_results.disagreements(files(), SHA256) == []
    assert readme_results.disagreements(files(), "t") == [
        f"{name} was measured with another bundle" for name in ("segmenting", "labelling")
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"miou": 61.4}, "PyTorch eager has mIoU 61.4, the run's val row 61.22"),
        ({"miou": 40.0, "photographs": 48}, ""),  # of fewer photographs it says nothing
        ({"label_agreement": 0.99}, "99.0000% of labels agree, expected 99.9%"),
        ({"miou": None}, "pytorch-eager has no miou"),
        ({"problem": "torch is not installed"}, "pytorch-eager did not run: torch is not installed"),
        ({"engine": "pytorch-compile"}, "segmenting has no row of pytorch-eager"),
    ],
)
def test_what_disagrees_is_a_sentence(changes: dict[str, Any], said: str) -> None:
    made = files()
    made["segmenting"]["segment"][1] |= changes
    assert readme_results.disagreements(made, SHA256) == ([said] if said else [])


def test_a_default_that_did_not_run_disagrees() -> None:
    made = files()
    made["segmenting"]["segment"][0] = {"engine": "onnxruntime-cpu", "default": True, "problem": "broken"}
    made["labelling"]["label"] = []
    assert readme_results.disagreements(made, SHA256) == [
        f"{name} has no row of the default engine that ran" for name in ("segmenting", "labelling")
    ]


def test_the_walks_binding_floor_is_the_higher_one() -> None:
    times = {"size": 16, "channels": 2, "ways": {"multisa": {"median_ms": 1.0}}}
    for rate, of in ((1e6, "multiply-adds"), (1e18, "bytes")):
        found = floor(times, {"multiply_adds_per_second": rate})
        assert found["binding"]["text"].startswith(of)
        assert found["binding"]["floor_ms"] == max(found["floor_ms"], found["bytes_floor_ms"])
        assert found["binding"]["share"] == max(found["share_of_peak"], found["share_of_bytes_floor"])


def test_every_file_says_what_it_was_measured_on() -> None:
    described = environment("numpy", "no-such-package", quick=True)
    assert described["quick"] is True and "no-such-package" not in described["versions"]
    assert {"processor", "cores", "instruction_set", "commit", "load_at_start"} <= described.keys()
    commit = described["commit"]
    assert commit is None or int(commit.removesuffix("+"), 16) >= 0
