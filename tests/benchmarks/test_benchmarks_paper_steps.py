"""benchmarks/paper_steps.py: every stage of one of the paper's presets, at a small crop and batch."""

from pathlib import Path

import pytest

from multisa.benchmarks.paper_steps import PRESETS, STAGES, TRAININGS, configuration, estimated_hours, measure
from multisa.benchmarks.paper_steps import multiply_adds as count
from multisa.training.loop import CHECKPOINT

pytestmark = pytest.mark.slow


def test_every_stage_of_a_paper_preset_runs(tmp_path: Path) -> None:
    small = [f"{name}.schedule.{value}" for name in TRAININGS for value in ("crop=64", "batch_size=2")]
    config = configuration("paper-resnet50", [*small, "long_side=64"])
    measured = {stage: measure(stage, config, tmp_path, part=1) for stage in STAGES}
    assert all(result["seconds"] > 0 and result["peak_memory_mib"] > 100 for result in measured.values())
    assert {measured[stage]["parts"] for stage in TRAININGS} == {2}
    for stage in TRAININGS:
        assert (tmp_path / stage / CHECKPOINT).stat().st_size > 1_000_000
    assert len(list((tmp_path / "segmenter-val").glob("*.png"))) == 1
    assert estimated_hours("paper-resnet50", measured) > 0


def test_multiply_adds_of_the_presets_at_their_own_size() -> None:
    config = configuration(PRESETS[0], [])
    assert config.cam.schedule.crop == 512 and config.affinity.schedule.batch_size == 32
    cam, twice = count("cam", config), count("cam", configuration(PRESETS[0], ["cam.schedule.batch_size=16"]))
    # ResNet-50 at stride 16 has 5 billion multiply-adds for 224 x 224 pixels, 26 for 512 x 512, and a training step
    # three times that; self-attention and fusion add to it.
    assert cam is not None and twice == 2 * cam
    assert 8 * 3 * 26e9 < cam < 8 * 3 * 26e9 * 5
    assert count("affinity-labels", config) is None
