"""Weights & Biases and MLflow, offline: what their own readers find of a run that was killed and resumed."""

import struct
import time

import numpy as np
import pytest
from conftest import CLASSES, make_run_config

from bn_keras import InputError
from bn_keras.runs.run_directory import RunDirectory
from bn_keras.training import trackers
from bn_keras.training.run_writer import RunRecord

ONCE = [(step, 1 / step) for step in range(1, 7)]
"""The loss of each step, as it must be told: once, in order."""


def killed_and_resumed(folder, name, pause=0.0):
    """Records 6 steps with a checkpoint every 2; a kill after step 3 loses it, and a second process takes it again."""
    config = make_run_config(steps=6)
    for first, last in ((1, 3), (3, 6)):
        directory = RunDirectory(str(folder))
        directory.open(config, CLASSES)
        record = RunRecord(config, directory, first - 1, trackers=[name])
        for step in range(first, last + 1):
            record.add("training", step, 32 * step, loss=1 / step)
            if step % 2 == 0:
                record.save(step, {"step": np.int64(step)}, 0)
        record.close("stopped")
        directory._lock.close()
        time.sleep(pause)


def test_a_tracker_is_told_each_row_once_when_a_checkpoint_covers_it(tmp_path, monkeypatch):
    told = []

    class Fake:
        def __init__(self, run, name, settings):
            self.run = run or "seven"
            told.append((run, name, settings["variant"]))

        def log(self, step, wall_time, values):
            told.append((step, values["loss/training"]))

        def close(self):
            pass

    monkeypatch.setitem(trackers.TRACKERS, "mlflow", Fake)
    killed_and_resumed(tmp_path / "run", "mlflow")
    assert told == [(None, "run", "bn_x5"), *ONCE[:2], ("seven", "run", "bn_x5"), *ONCE[2:]]


@pytest.mark.needs("mlflow")
def test_mlflow_has_one_run_and_each_step_once(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlflow")
    killed_and_resumed(tmp_path / "run", "mlflow")
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss/training")
    assert [(metric.step, metric.value) for metric in history] == ONCE
    assert run.data.params["variant"] == "bn_x5" and run.info.run_name == "run" and run.info.status == "FINISHED"


def offline_records(content):
    """What W&B's file holds, in the format of LevelDB's log: blocks of 32 KiB, a record in one part or in several."""
    place, record = 7, b""  # behind W&B's own mark
    while place < len(content):
        if 32_768 - place % 32_768 < 7:  # too short for a header
            place += 32_768 - place % 32_768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        record = (b"" if kind in (1, 2) else record) + content[place + 7 : place + 7 + length]
        if kind in (1, 4):
            yield record
        place += 7 + length


@pytest.mark.needs("mlflow")
def test_a_tracker_that_cannot_begin_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nosuch://x")
    with pytest.raises(InputError, match=r"\A`tracker=mlflow` cannot begin: .*nosuch.*\Z"):
        killed_and_resumed(tmp_path / "run", "mlflow")


@pytest.mark.needs("wandb")
def test_weights_and_biases_has_one_run_and_each_step_once(tmp_path, monkeypatch):
    from wandb.proto.wandb_internal_pb2 import Record

    for variable, value in {"MODE": "offline", "SILENT": "true", "DIR": str(tmp_path)}.items():
        monkeypatch.setenv(f"WANDB_{variable}", value)
    killed_and_resumed(tmp_path / "run", "wandb", pause=1.1)  # W&B names a folder by the second in which it begins
    runs, history = set(), []
    for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        for content in offline_records(path.read_bytes()):
            record = Record.FromString(content)
            if record.HasField("run"):
                runs.add(record.run.run_id)
            if record.HasField("history"):
                values = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                history.append((int(values["step"]), float(values["loss/training"])))
    assert len(runs) == 1 and history == ONCE
