"""An open TensorBoard shows one line for a run that was killed and resumed, by its slow loader too."""

from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.util.tensor_util import make_ndarray

from bn_keras.training.tensorboard import TensorBoardWriter


def row(step, loss):
    return {"kind": "training", "step": step, "loss": loss, "wall_time": 1e9 + step}


def write(directory, rows, more=()):
    writer = TensorBoardWriter(str(directory), {"variant": "bn_x5"}, rows)
    for each in more:
        writer.add(each)
    writer.close()


def losses(events):
    return [(event.step, make_ndarray(event.tensor_proto).item()) for event in events.Tensors("training/loss")]


def test_what_a_resumed_run_forgets_is_forgotten_by_a_tensorboard_that_is_open(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    write(run, [], [row(10, 1.0), row(20, 0.5), row(30, 0.25)])
    opened = EventMultiplexer(tensor_size_guidance={"tensors": 0})  # what --load_fast=false reads with
    opened.AddRunsFromDirectory(str(tmp_path))
    opened.Reload()
    events = opened.GetAccumulator("run")
    assert losses(events) == [(10, 1.0), (20, 0.5), (30, 0.25)]
    write(run, [row(10, 1.0), row(20, 0.5)])
    write(run, [row(10, 1.0)], [row(15, 0.75), row(20, 0.5)])
    opened.Reload()
    assert losses(events) == [(10, 1.0), (15, 0.75), (20, 0.5)]
