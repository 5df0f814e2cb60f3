"""An open TensorBoard shows one line for a run that was killed and resumed, by its slow loader too."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.util.tensor_util import make_ndarray

from bn_keras.tensorboard import TensorBoardWriter


def row(step, loss):
    return {"kind": "training", "step": step, "loss": loss, "wall_time": 1e9 + step}


def write(directory, rows, more=()):
    writer = TensorBoardWriter(str(directory), {"variant": "bn_x5"}, rows)
    for each in more:
        writer.add(each)
    writer.close()


def losses(events):
    return [(event.step, make_ndarray(event.tensor_proto).item()) for event in events.Tensors("training/loss")]


@pytest.mark.parametrize("reader", ["one run", "a folder of runs"])
def test_what_a_resumed_run_forgets_is_forgotten_by_a_tensorboard_that_is_open(tmp_path, reader):
    run = tmp_path / "run"
    run.mkdir()
    write(run, [], [row(10, 1.0), row(20, 0.5), row(30, 0.25)])
    if reader == "one run":
        events = EventAccumulator(str(run), size_guidance={"tensors": 0})
        load = events.Reload
    else:
        multiplexer = EventMultiplexer(tensor_size_guidance={"tensors": 0})
        multiplexer.AddRunsFromDirectory(str(tmp_path))
        load, events = multiplexer.Reload, multiplexer.GetAccumulator("run")
    load()
    assert losses(events) == [(10, 1.0), (20, 0.5), (30, 0.25)]
    write(run, [row(10, 1.0), row(20, 0.5)])  # killed at 30, back to the checkpoint of 20
    write(run, [row(10, 1.0)], [row(15, 0.75), row(20, 0.5)])
    load()
    assert losses(events) == [(10, 1.0), (15, 0.75), (20, 0.5)]
    assert "hparams" in str(events.PluginTagToContent("hparams"))
