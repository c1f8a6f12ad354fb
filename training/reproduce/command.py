"""One table or figure of the paper by its name: what `multisa reproduce` runs."""

from pathlib import Path

from multisa.runtime.errors import UsageError
from multisa.runtime.progress import log
from multisa.runtime.records import record_to_dict
from multisa.training.config import TrainConfig
from multisa.training.data import DataSet
from multisa.training.pipeline import RUN_RECORD, load_run
from multisa.training.reproduce.figures import FIGURES, PHOTOGRAPHS, reproduce_figure
from multisa.training.reproduce.report import FOLDER, format_text
from multisa.training.reproduce.tables import TABLES, reproduce_table


def reproduce_paper(
    what: str,
    config: TrainConfig,
    dataset: DataSet,
    root: Path,
    photographs: int | None = None,
    chosen: Path | None = None,
) -> str:
    """Make `what` below `root` and return what is to be printed.

    photographs, chosen: of a figure, as `reproduce_figure` takes them; at most one of the two. Raises
    UsageError where they are given for a table, or both, and as `reproduce_table` and `reproduce_figure`.
    """
    if what in TABLES and (photographs is not None or chosen is not None):
        raise UsageError(
            f"--photographs and --list: got one with {what}, expected a figure: a table has none"
        )
    if photographs is not None and chosen is not None:
        raise UsageError("--photographs and --list: got both, expected one of them")
    _say_what_differs(config, root)
    if what in TABLES:
        text = format_text(reproduce_table(what, config, dataset, root))
        return f"{text}\n\nwritten: {root / FOLDER / what}.json and .md"
    assert what in FIGURES
    count = PHOTOGRAPHS if photographs is None else photographs
    path, text = reproduce_figure(what, config, dataset, root, count=count, chosen=chosen)
    return f"{text}\n\nwritten: {path} and .json"


def _say_what_differs(config: TrainConfig, root: Path) -> None:
    """Tell of settings that are not those of the finished run in `root`: its stages will not be reused."""
    if not (root / RUN_RECORD).is_file():
        return
    kept, asked = (_flat(record_to_dict(c)) for c in (load_run(root).config, config))
    differing = [f"{key} {asked[key]} (there: {kept[key]})" for key in asked if asked[key] != kept[key]]
    if differing:
        log.info(
            f"{root / RUN_RECORD}: other settings, what depends on them is made anew: {', '.join(differing)}"
        )


def _flat(values: dict[str, object], before: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        name = f"{before}{key}"
        flat.update(_flat(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat
