"""Sends each row of a run's curve once to experiment trackers: Weights & Biases and MLflow.

A row is sent after a checkpoint of its step was written, so a tracker never gets rows that a resumed run drops.
`trackers.json` in the run's directory says which run of the tracker it is, and how many rows were sent. Server, project
and mode are set by the trackers' own environment variables, such as WANDB_MODE=offline or MLFLOW_TRACKING_URI.
"""

import json
import os
from collections.abc import Callable, Collection
from typing import Any, Protocol

from bn_keras import storage
from bn_keras.errors import InputError, first_line
from bn_keras.json_files import COUNT, TEXT, map_of, object_of, read_json
from bn_keras.runs.run_files import write_text
from bn_keras.training.tensorboard import scalars

FILE = "trackers.json"
_SCHEMA = map_of(object_of(run=TEXT, rows=COUNT))


class Tracker(Protocol):
    """One run in one tracker.

    Attributes:
      run: the run's id in the tracker.
    """

    run: str

    def log(self, step: int, wall_time: float, values: dict[str, float]) -> None:
        """Sends the values of one step, by their tags in TensorBoard; `wall_time` is in seconds since 1970."""

    def close(self) -> None: ...


class WandB:
    """A run of Weights & Biases; the arguments are those of `MLflow`."""

    def __init__(self, run: str | None, name: str, settings: dict[str, Any]):
        import wandb

        project = os.environ.get("WANDB_PROJECT", "bn_keras")
        self._run = wandb.init(id=run, name=name, project=project, config=settings, resume="allow")
        self._run.define_metric("*", step_metric="step")  # W&B's own counts calls, and drops what is behind it
        self.run = self._run.id

    def log(self, step: int, wall_time: float, values: dict[str, float]) -> None:
        self._run.log({**values, "step": step, "_timestamp": wall_time})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow.

    Args:
      run: the id of the run to continue; None for a new one.
      name: the run's name.
      settings: the run's settings, numbers and strings.
    """

    def __init__(self, run: str | None, name: str, settings: dict[str, Any]):
        import mlflow

        experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "bn_keras"))
        self._client = mlflow.MlflowClient()
        if run is None:
            run = self._client.create_run(experiment.experiment_id, run_name=name).info.run_id
            for setting, value in settings.items():
                self._client.log_param(run, setting, value)
        self._client.update_run(run, status="RUNNING")
        self.run = run

    def log(self, step: int, wall_time: float, values: dict[str, float]) -> None:
        for tag, value in values.items():
            self._client.log_metric(self.run, tag, value, timestamp=int(1000 * wall_time), step=step)

    def close(self) -> None:
        self._client.set_terminated(self.run)


TRACKERS: dict[str, Callable[[str | None, str, dict[str, Any]], Tracker]] = {"wandb": WandB, "mlflow": MLflow}


class Trackers:
    """The trackers of one run.

    Args:
      directory: the run's directory.
      settings: the run's settings, numbers and strings.
      names: keys of `TRACKERS`.

    Raises:
      InputError: a tracker cannot be reached.
    """

    def __init__(self, directory: str, settings: dict[str, Any], names: Collection[str]):
        self._path = os.path.join(directory, FILE)
        self._known = {}
        if storage.exists(self._path):
            self._known = read_json(self._path, _SCHEMA, "remove it, and the trackers begin new runs")
        run_name = os.path.basename(storage.absolute(directory))
        self._trackers: dict[str, Tracker] = {}
        for name in names:
            run = self._known.get(name, {}).get("run")
            try:
                self._trackers[name] = TRACKERS[name](run, run_name, settings)
            except Exception as error:  # whatever a tracker raises about its server, project or credentials
                raise InputError(f"`tracker={name}` cannot begin: {first_line(error)}") from error

    def tell(self, rows: list[dict]) -> None:
        """Sends the rows that were not sent yet; a checkpoint must exist for all of them."""
        for name, tracker in self._trackers.items():
            for row in rows[self._known.get(name, {}).get("rows", 0) :]:
                tracker.log(row["step"], row.get("wall_time", 0.0), dict(scalars(row)))
            self._known[name] = {"run": tracker.run, "rows": len(rows)}
        if self._trackers:
            write_text(self._path, json.dumps(self._known))

    def close(self) -> None:
        for tracker in self._trackers.values():
            tracker.close()
