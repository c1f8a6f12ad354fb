"""Send the metrics of a training to TensorBoard, MLflow or Weights & Biases, where asked for and installed.

Each takes the same values as `metrics.csv`, under the name "stage/metric", and continues its run when ours resumes.
"""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

from multisa.runtime.errors import BackendUnavailable
from multisa.runtime.files import sha256_of_bytes
from multisa.runtime.records import record_to_dict
from multisa.training.config import TrainConfig

PROJECT = "multisa"  # name of the MLflow experiment and of the W&B project
FOLDER = "tensorboard"  # of the event files, in the run folder
MOST_PARAM = 500  # characters of a setting that MLflow accepts

# log(stage, metric, value, step) sends one value; close(finished) ends the run, as finished or stopped.
Tracker = tuple[Callable[[str, str, float, int], object], Callable[[bool], object]]


def check_trackers(config: TrainConfig) -> None:
    """Raise BackendUnavailable for a tracker of `config.trackers` whose package is not installed."""
    for name in config.trackers:
        if importlib.util.find_spec(name) is None:
            raise BackendUnavailable(
                f"tracker {name!r}: the package {name} is not installed",
                remedy=f"pip install {name}, or leave {name} out of --track and trackers",
            )


def open_tracker(name: str, config: TrainConfig, output: Path, identity: str) -> Tracker:
    """Open one of `config.trackers`; raises whatever its package raises.

    identity: digest of settings and data; another one in the same run folder is another run for the tracker.
    """
    open_one = {"tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb}[name]
    return open_one(config, output, sha256_of_bytes(f"{output.resolve()} {identity}".encode())[:16])


def _tensorboard(config: TrainConfig, output: Path, run: str) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(output / FOLDER / run), flush_secs=10)
    return lambda stage, name, value, step: writer.add_scalar(f"{stage}/{name}", value, step), lambda _: writer.close()


def _mlflow(config: TrainConfig, output: Path, run: str) -> Tracker:
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    found = client.get_experiment_by_name(PROJECT)
    experiment = found.experiment_id if found else client.create_experiment(PROJECT)
    earlier = client.search_runs([experiment], f"tags.multisa_run = '{run}'")
    current = earlier[0] if earlier else client.create_run(experiment, run_name=config.name, tags={"multisa_run": run})
    key = current.info.run_id
    client.update_run(key, status="RUNNING")
    for setting, value in record_to_dict(config).items() if not earlier else ():
        client.log_param(key, setting, str(value)[:MOST_PARAM])

    def log(stage: str, name: str, value: float, step: int) -> None:
        client.log_metric(key, re.sub(r"[^\w\-./ ]", "_", f"{stage}/{name}"), value, step=step)  # what MLflow accepts

    return log, lambda finished: client.set_terminated(key, "FINISHED" if finished else "KILLED")


def _wandb(config: TrainConfig, output: Path, run: str) -> Tracker:
    import wandb

    settings = record_to_dict(config)
    current = wandb.init(project=PROJECT, name=config.name, id=run, resume="allow", dir=str(output), config=settings)
    current.define_metric("*", step_metric="step")  # the optimisation step starts again with every stage
    return (
        lambda stage, name, value, step: current.log({f"{stage}/{name}": value, "step": step}),
        lambda finished: current.finish(exit_code=0 if finished else 1),
    )
