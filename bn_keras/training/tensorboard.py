"""TensorBoard's view of a run: scalars of its curve, charts of the paper's figures, hyper-parameters, pictures.

Event files are made from the curve: opening a run's writer deletes its old event files and writes the whole curve
again. A run that was killed and resumed thus shows one unbroken line, with the times at which its points were made.
"""

import io
import os
from collections.abc import Iterator

from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.custom_scalar import metadata as custom_scalar
from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Chart, Layout, MarginChartContent
from tensorboard.plugins.custom_scalar.layout_pb2 import MultilineChartContent as Lines
from tensorboard.plugins.hparams.summary_v2 import HParam, Metric, hparams_config_pb, hparams_pb
from tensorboard.plugins.image import metadata as image
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util.tensor_util import make_tensor_proto

from bn_keras import markdown, storage

VALIDATION = "accuracy/validation"
"""Tag of the validation accuracy, which is Figure 2's curve and the metric in the table of runs."""

_SCALARS = {
    "training": {
        "loss": "loss/training",
        "accuracy": "accuracy/training",
        "learning_rate": "learning_rate",
        "images_per_second": "speed/images_per_second",
        "images_per_second_per_device": "speed/images_per_second_per_device",
        "input_wait": "speed/share_waiting_for_input",
        "step_seconds_p50": "speed/step_seconds_p50",
        "step_seconds_p90": "speed/step_seconds_p90",
        "step_seconds_p99": "speed/step_seconds_p99",
        "peak_host_bytes": "memory/peak_host_bytes",
        "peak_gpu_bytes": "memory/peak_gpu_bytes",
    },
    "validation": {"top1": VALIDATION, "top5": "accuracy/validation_top5", "loss": "loss/validation"},
    "ema": {"top1": "accuracy/validation_ema"},
    "population": {"top1": "accuracy/validation_population"},
}
_COUNTS = {"top1", "top5"}
"""Fields that are divided by the number of examples in the row."""

_FIRST = "run", "variant", "learning_rate"
"""The first columns of TensorBoard's table of runs. It sorts columns by name, so these names begin with a digit."""


class TensorBoardWriter:
    """Writes the events of one run into `directory`, under the run's folder name in TensorBoard.

    Args:
      directory: the run's.
      hyper_parameters: a flat dictionary of numbers and strings, shown under HPARAMS and TEXT. Its "monitor", if any,
        names the layers whose percentiles the rows will hold.
      rows: the rows that the curve holds already.
    """

    def __init__(self, directory: str, hyper_parameters: dict, rows: list[dict]):
        for name in storage.files(directory):
            if name.startswith("events.out.tfevents."):
                storage.remove(os.path.join(directory, name))
        self._outbox = storage.Outbox(directory)
        self._writer = EventFileWriter(self._outbox.path)
        start = rows[0].get("wall_time") if rows else None
        # An open TensorBoard has read a file that is deleted now: at this event it drops the points of that file.
        self._writer.add_event(Event(session_log=SessionLog(status=SessionLog.START), wall_time=start or 0.0))
        known = {name: value for name, value in hyper_parameters.items() if value is not None}
        table = {"run": os.path.basename(storage.absolute(directory)), **known}
        columns = {name: HParam(_column(name), display_name=name) for name in table}
        for summary in (
            hparams_config_pb(columns.values(), [Metric(VALIDATION, display_name="validation accuracy")], start),
            hparams_pb({columns[name]: value for name, value in table.items()}, start_time_secs=start),
            text_pb("hyper-parameters", markdown.table(["setting", "value"], ([n, str(v)] for n, v in table.items()))),
            _layout_pb([*filter(None, hyper_parameters.get("monitor", "").split(","))]),
        ):
            self._add(summary, 0, start)
        for row in rows:
            self.add(row)
        self.flush()

    def add(self, row: dict) -> None:
        """Adds one row of the curve."""
        for tag, value in scalars(row):
            self._add(scalar_pb(tag, value), row["step"], row.get("wall_time"))

    def add_picture(self, name: str, step: int, png: bytes, wall_time: float) -> None:
        """Adds a picture, the bytes of a PNG file, to the page IMAGES."""
        with Image.open(io.BytesIO(png)) as picture:
            size = [str(length).encode() for length in picture.size]
        value = Summary.Value(
            tag=f"pictures/{name}",
            metadata=image.create_summary_metadata(display_name=None, description=""),
            tensor=make_tensor_proto([*size, png], dtype="string"),
        )
        self._add(Summary(value=[value]), step, wall_time)

    def flush(self) -> None:
        self._writer.flush()
        self._outbox.send()

    def close(self) -> None:
        self._writer.close()
        self._outbox.send()

    def _add(self, summary, step, wall_time):
        event = Event(step=step, wall_time=wall_time or 0.0)
        event.summary.ParseFromString(summary.SerializeToString())
        self._writer.add_event(event)


def _column(name):
    """The name of a hyper-parameter's column, by which TensorBoard sorts."""
    return f"{_FIRST.index(name)} {name}" if name in _FIRST else name


def scalars(row: dict) -> Iterator[tuple[str, float]]:
    """The points (tag, value) of one row."""
    if row["kind"] == "monitor":
        for layer, looks in row["layers"].items():
            for what, values in looks.items():
                for percentile, value in zip(row["percentiles"], values, strict=True):
                    yield f"{layer}/{what}_{percentile}", value
    for field, tag in _SCALARS.get(row["kind"], {}).items():
        if field in row:
            yield tag, row[field] / row["of"] if field in _COUNTS else row[field]


def _layout_pb(monitored):
    """The charts of the page CUSTOM SCALARS: Figure 2, the losses, and Figure 1 for each monitored layer."""
    charts = [
        Chart(title="Figure 2: validation accuracy", multiline=Lines(tag=[f"^{VALIDATION}$"])),
        Chart(
            title="Loss in training and in validation", multiline=Lines(tag=["^loss/training$", "^loss/validation$"])
        ),
    ]
    for layer in monitored:
        band = {part: f"{layer}/input_{percent}" for part, percent in (("lower", 15), ("value", 50), ("upper", 85))}
        content = MarginChartContent(series=[MarginChartContent.Series(**band)])
        charts.append(Chart(title=f"Figure 1: inputs of {layer}", margin=content))
    layout = Layout(category=[Category(title="The paper's figures", chart=charts)])
    value = Summary.Value(
        tag=custom_scalar.CONFIG_SUMMARY_TAG,
        metadata=custom_scalar.create_summary_metadata(),
        tensor=make_tensor_proto(layout.SerializeToString(), dtype="string"),
    )
    return Summary(value=[value])
