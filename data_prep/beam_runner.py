"""Writes shards on a cluster with Apache Beam: each shard is one element, written by the same function as locally.

The workers need this package, and the inputs and the output folder under the same paths (a shared disk, or gs://...).
"""

from collections.abc import Callable

from data_prep.errors import InputError
from data_prep.shard import ShardTask


def run(write: Callable[[ShardTask], None], tasks: list[ShardTask], options: list[str]) -> None:
    """Calls `write` for every task, and waits until all are done.

    Args:
      write: `shard.write`.
      tasks: the argument of each call.
      options: Beam's own flags; without --runner, Beam uses its DirectRunner.
    Raises:
      InputError: a worker has raised it.
    """
    import apache_beam
    from apache_beam.options.pipeline_options import PipelineOptions

    try:
        with apache_beam.Pipeline(options=PipelineOptions(options)) as pipeline:
            shards = pipeline | apache_beam.Create(tasks) | apache_beam.Reshuffle()
            shards | apache_beam.Map(write)
    except Exception as error:  # of the runner's own class, with the worker's traceback as text
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"--runner=beam: {lines[-1].partition(' [while running')[0]}") from error
