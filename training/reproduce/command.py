"""One table or figure of the paper by name: what `multisa reproduce` runs."""

from dataclasses import replace
from pathlib import Path

from multisa.runtime.errors import UsageError
from multisa.runtime.progress import log
from multisa.runtime.records import record_to_dict
from multisa.training.config import TrainConfig
from multisa.training.data import Dataset
from multisa.training.models import with_taps
from multisa.training.reproduce.figures import FIGURES, NUM_IMAGES, reproduce_figure
from multisa.training.reproduce.tables import FOLDER, TABLES, format_text, reproduce_table
from multisa.training.run_record import RUN_RECORD, load_run
from multisa.training.runs import flat_settings


def reproduce_paper(
    what: str,
    config: TrainConfig,
    dataset: Dataset,
    output: Path,
    *,
    num_images: int | None = None,
    image_list: Path | None = None,
) -> str:
    """Make a table or figure of the paper below `output`/reproduce and return the text to print.

    what: "table1" to "table3" or "figure4" to "figure6". num_images (default 4), or image_list, a file of
    ids, one per line: the images of a figure. Finished stages in `output` are reused and missing ones are
    run. Raises UsageError for both, for either of them with a table, and for a name that does not exist;
    otherwise as `reproduce_table`, `reproduce_figure` and `multisa.training.train`.
    """
    if what not in TABLES and what not in FIGURES:
        raise UsageError(f"got {what!r}, expected one of {', '.join((*TABLES, *FIGURES))}")
    if what in TABLES and (num_images is not None or image_list is not None):
        raise UsageError(f"--num-images and --list: got one with {what}, expected a figure: tables show no images")
    if num_images is not None and image_list is not None:
        raise UsageError("--num-images and --list: got both, expected one of them")
    _log_differences(replace(config, cam=with_taps(config.cam)), output)
    if what in TABLES:
        text = format_text(reproduce_table(what, config, dataset, output))
        return f"{text}\n\nwritten: {output / FOLDER / what}.json and .md"
    count = NUM_IMAGES if num_images is None else num_images
    path, text = reproduce_figure(what, config, dataset, output, count=count, chosen=image_list)
    return f"{text}\n\nwritten: {path} and .json"


def _log_differences(config: TrainConfig, output: Path) -> None:
    """Log the settings that differ from those of the finished run in `output`."""
    if not (output / RUN_RECORD).is_file():
        return
    before, now = (flat_settings(record_to_dict(c)) for c in (load_run(output).config, config))
    differing = [f"{key} {now[key]} (there: {before[key]})" for key in now if now[key] != before[key]]
    if differing:
        changes = ", ".join(differing)
        log.info(f"{output / RUN_RECORD}: other settings, stages that depend on them run again: {changes}")
