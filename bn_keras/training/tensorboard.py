"""TensorBoard's view of a run: scalars of its curve, its hyper-parameters; needs tensorboard, not TensorFlow.

The curve is the truth and the event file a picture of it: opening a run's writer deletes its old event files and draws
the whole curve again. So a run that was killed and resumed shows one unbroken line, with the times at which its points
were first made.
"""

import glob
import os

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

_SCALARS = {
    "training": {
        "loss": "training/loss",
        "accuracy": "accuracy/training",
        "learning_rate": "training/learning_rate",
        "images_per_second": "speed/images_per_second",
        "images_per_second_per_device": "speed/images_per_second_per_device",
        "input_wait": "speed/share_waiting_for_input",
        "step_seconds_p50": "speed/step_seconds_p50",
        "step_seconds_p90": "speed/step_seconds_p90",
        "step_seconds_p99": "speed/step_seconds_p99",
        "peak_host_bytes": "memory/peak_host_bytes",
        "peak_gpu_bytes": "memory/peak_gpu_bytes",
    },
    "validation": {"top1": "accuracy/validation", "top5": "accuracy/validation_top5"},
    "ema": {"top1": "accuracy/validation_ema"},
    "population": {"top1": "accuracy/validation_population"},
}


class TensorBoardWriter:
    """Writes the events of one run into `directory`, under the run's folder name in TensorBoard.

    Args:
      directory: the run's.
      hyper_parameters: flat dictionary of numbers and strings, shown under HPARAMS and TEXT.
      rows: what the curve holds already.
    """

    def __init__(self, directory: str, hyper_parameters: dict, rows: list[dict]):
        for old in glob.glob(os.path.join(glob.escape(directory), "events.out.tfevents.*")):
            os.remove(old)
        self._writer = EventFileWriter(directory)
        start = rows[0].get("wall_time") if rows else None
        # A TensorBoard that is open has read a file that is gone now: at this event it forgets that one's points.
        self._writer.add_event(Event(session_log=SessionLog(status=SessionLog.START), wall_time=start or 0.0))
        table = "\n".join(["| | |", "|-|-|", *(f"| {name} | {value} |" for name, value in hyper_parameters.items())])
        for summary in (
            hparams_pb(hyper_parameters, start_time_secs=start),
            text_pb("hyper-parameters", table),
        ):
            self._add(summary, 0, start)
        for row in rows:
            self.add(row)
        self.flush()

    def add(self, row: dict):
        """Adds one row of the curve."""
        for tag, value in _scalars(row):
            self._add(scalar_pb(tag, value), row["step"], row.get("wall_time"))

    def flush(self):
        self._writer.flush()

    def close(self):
        self._writer.close()

    def _add(self, summary, step, wall_time):
        event = Event(step=step, wall_time=wall_time or 0.0)
        event.summary.ParseFromString(summary.SerializeToString())
        self._writer.add_event(event)


def _scalars(row):
    """The points (tag, value) of one row."""
    if row["kind"] == "monitor":
        for layer, looks in row["layers"].items():
            for what, values in looks.items():
                for percentile, value in zip(row["percentiles"], values, strict=True):
                    yield f"{layer}/{what}_{percentile}", value
    for field, tag in _SCALARS.get(row["kind"], {}).items():
        if field in row:
            yield tag, row[field] / row.get("of", 1)
