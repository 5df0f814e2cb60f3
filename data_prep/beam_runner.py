"""Writes shards on a cluster through Apache Beam: one element a shard, the same pure function as locally.

The workers need this package, and the inputs and the output folder under the same paths (a shared disk, or gs://...).
"""

from collections.abc import Callable

from data_prep.errors import InputError
from data_prep.shard import ShardTask


def run(write: Callable[[ShardTask], None], tasks: list[ShardTask], options: list[str]) -> None:
    """Calls `write` for every task and waits for the end.

    Args:
      write: `shard.write`.
      tasks: its arguments.
      options: Beam's own flags; without --runner its DirectRunner.
    Raises:
      InputError: what a worker raised.
    """
    import apache_beam
    from apache_beam.options.pipeline_options import PipelineOptions

    try:
        with apache_beam.Pipeline(options=PipelineOptions(options)) as pipeline:
            shards = pipeline | apache_beam.Create(tasks) | apache_beam.Reshuffle()
            shards | apache_beam.Map(write)
    except Exception as error:  # a runner's own kind, around a worker's traceback as text
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"--runner=beam: {lines[-1].partition(' [while running')[0]}") from error
