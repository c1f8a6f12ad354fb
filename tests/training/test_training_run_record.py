"""The table of results is readable at any number of classes."""

import pytest

from multisa.runtime.bundle import LabelParameters, SegmenterLabelParameters
from multisa.training.config import TrainConfig
from multisa.training.run_record import ImageCounts, Row, RunRecord


def record(names: tuple[str, ...], rows: tuple[Row, ...]) -> RunRecord:
    return RunRecord(
        config=TrainConfig(),
        classes=names,
        palette=(),
        images=ImageCounts(2, 2, 2),
        data_digest="",
        label=LabelParameters(),
        segmenter_label=SegmenterLabelParameters(),
        score_thresholds=(),
        betas=(),
        rows=rows,
        stages=(),
        seconds=1.0,
        torch="",
        threads=1,
    )


@pytest.mark.parametrize(("count", "stages"), [(2, 1), (10, 4), (11, 4), (21, 12), (81, 12), (255, 3)])
def test_the_table_is_readable_at_any_number_of_classes(count: int, stages: int) -> None:
    names = tuple(f"class number {n}" for n in range(count))
    ious = tuple(None if n == 1 else 100 * n / count for n in range(count))
    rows = tuple(Row(f"stage {n} with a long name", "train", 50.0 + n, ious) for n in range(stages))
    text = record(names, rows).format_table()
    assert max(map(len, text.splitlines())) <= 160
    assert text.count("stage ") == stages + 1 and all(f"{50.0 + n:.2f}" in text for n in range(stages))
    if count <= 10:
        assert text.startswith("stage") and len(text.splitlines()) == 1 + stages
        return
    head, *table = text.split("\n\n")[1].splitlines()
    assert head.split()[3:] == [str(n) for n in range(1, stages + 1)]
    for name, iou, line in zip(names, ious, table, strict=True):
        assert line.startswith(name) and line.split()[3:] == ["-" if iou is None else f"{iou:.2f}"] * stages
        assert len(line) == len(head)


def test_nothing_measured() -> None:
    assert record(("background", "a"), ()).format_table() == "no masks in this data set: nothing was measured"
