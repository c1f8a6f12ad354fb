"""The run that a table or a figure needs as a whole, beside another one in the same folder."""

from pathlib import Path

from multisa.runtime.files import write_json_atomically
from multisa.runtime.records import record_to_dict
from multisa.training.config import TrainConfig
from multisa.training.data import DataSet
from multisa.training.pipeline import RUN_RECORD, RunRecord, load_run, make_run
from multisa.training.reproduce.report import FOLDER


def whole_run(config: TrainConfig, dataset: DataSet, root: Path) -> RunRecord:
    """Make what is missing of the run and write its record.

    To `root/run.json`, as `multisa train` does; to `root/reproduce/run.json` where that is of other settings
    or other data: it stays what the exporter takes. Raises UsageError, before any training, for a record
    there that cannot be read.
    """
    kept = load_run(root) if (root / RUN_RECORD).is_file() else None
    run = make_run(config, dataset, root)
    own = kept is None or (kept.config, kept.data_digest) == (run.config, run.data_digest)
    write_json_atomically((root if own else root / FOLDER) / RUN_RECORD, record_to_dict(run))
    return run
