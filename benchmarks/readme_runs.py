"""The README's passage about runs over many images, from their results files."""

from typing import Any

from multisa.benchmarks.readme_sources import Files, source


def runs(files: Files) -> list[str]:
    """Pieces of the paragraph."""
    pipeline, kills, journal, uncertainty = (
        files[name] for name in ("pipeline", "kills", "journal", "uncertainty")
    )
    segment, label = pipeline["segment"], pipeline["label"]
    by_uncertainty, by_confidence = (
        uncertainty["methods"]["segment"][name]["spearman_with_1_minus_iou"]
        for name in ("by_uncertainty", "by_1_minus_confidence")
    )
    return [
        f"Runs on {pipeline['environment']['cores']} cores:",
        _one("segment", segment),
        _one("label", label),
        source(files, "pipeline"),
        f"Of {kills['points']} runs killed with SIGKILL at random moments and resumed, {kills['identical']}",
        f"are byte for byte the unbroken run, {kills['recomputed']} committed shards were done again.",
        source(files, "kills"),
        f"The journal of {journal['images']:,} images is read in",
        f"{_milliseconds(journal, '256')} ms a million (shards of 256), or",
        f"{_milliseconds(journal, '1')} ms with a shard for each image; freezing their list takes",
        f"{journal['inventory']['seconds_to_freeze_a_million']:.1f} s a million.",
        source(files, "journal"),
        f"Uncertainty ranks `segment`'s masks of {uncertainty['photographs']} val photographs, on which its formula was",
        f"chosen, by IoU with a correlation of {by_uncertainty:.2f}, confidence alone with {by_confidence:.2f}.",
        source(files, "uncertainty"),
    ]


def _one(command: str, run: dict[str, Any]) -> str:
    sizes = list(run["peak_mib"].values())
    together = run["images_per_second"] / run["sum_of_stages_images_per_second"]
    return (
        f"`multisa {command}` does {run['images']:,} photographs at {run['images_per_second']:.1f} a second, "
        f"{run['efficiency']:.2f} of what its slowest stage ({run['slowest_stage']}) does alone on all "
        f"cores, and {together:.2f} of what all stages together leave of them; peak memory {sizes[1]:.0f} "
        f"MiB, {run['memory_ratio']:.2f} of that for a tenth of them."
    )


def _milliseconds(journal: dict[str, Any], shard: str) -> str:
    return f"{1000 * journal['journal_seconds_for_a_million_images'][shard]:.3g}"
