"""What TensorBoard's own readers make of a run's events: unbroken lines, the table of runs, the charts of figures."""

import re

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.metadata import parse_experiment_plugin_data, parse_session_start_info_plugin_data
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
    return [(event.step, make_ndarray(event.tensor_proto).item()) for event in events.Tensors("loss/training")]


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


def test_the_table_of_runs_begins_with_name_variant_and_rate_and_is_sorted_by_validation_accuracy(tmp_path):
    writer = TensorBoardWriter(str(tmp_path), {"batch_size": 32, "learning_rate": 0.0075, "variant": "bn_x5"}, [])
    writer.close()
    contents = EventAccumulator(str(tmp_path)).Reload().PluginTagToContent("hparams")
    experiment = parse_experiment_plugin_data(contents["_hparams_/experiment"])
    shown = [info.display_name for info in sorted(experiment.hparam_infos, key=lambda info: info.name)]
    assert shown == ["run", "variant", "learning_rate", "batch_size"]  # TensorBoard sorts by name
    assert [info.name.tag for info in experiment.metric_infos] == ["accuracy/validation"]
    started = parse_session_start_info_plugin_data(contents["_hparams_/session_start_info"])
    assert started.hparams["0 run"].string_value == tmp_path.name


def test_a_page_of_charts_shows_figure_2_and_figure_1_of_each_monitored_layer(tmp_path):
    monitored = {"kind": "monitor", "step": 10, "percentiles": [15, 50, 85], "layers": {"a:3": {"input": [-1, 0, 1]}}}
    validation = {"kind": "validation", "step": 10, "top1": 9, "top5": 10, "of": 10, "loss": 0.5}
    writer = TensorBoardWriter(str(tmp_path), {"monitor": "a:3"}, [monitored, validation])
    writer.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    layout = Layout.FromString(make_ndarray(events.Tensors("custom_scalars__config__")[0].tensor_proto).item())
    accuracy, losses, inputs = layout.category[0].chart
    shown = {tag for tag in events.Tags()["tensors"] if any(re.match(part, tag) for part in accuracy.multiline.tag)}
    assert shown == {"accuracy/validation"} and "^loss/validation$" in losses.multiline.tag
    (band,) = inputs.margin.series
    values = [make_ndarray(events.Tensors(tag)[0].tensor_proto).item() for tag in (band.lower, band.value, band.upper)]
    assert values == [-1, 0, 1]
