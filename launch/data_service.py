"""Prepares training batches for trainers on other machines: a tf.data dispatcher and its worker in one process.

launch/data_service --port=5050                          on each machine that helps
launch/train ... --data_service=helper1:5050,helper2:5050   on the trainer; all need the records at the same path

Ctrl-C stops it. Trainers get the same batches as without it.
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: the folder above has the packages, this one would hide others
    sys.path[0] = str(Path(__file__).parents[1])

from typing import NoReturn

from absl import flags

from bn_keras.errors import InputError
from data_prep.program import as_started
from launch import program

FLAGS = flags.FLAGS

flags.DEFINE_integer("port", 5050, "Port of the dispatcher; 0 takes a free one.", 0, 65535)
flags.DEFINE_string("host", "localhost", "Name or address by which trainers reach this machine.")


def main() -> None:
    with program.loading_tensorflow():
        import tensorflow as tf

    service = tf.data.experimental.service
    try:
        dispatcher = service.DispatchServer(service.DispatcherConfig(port=FLAGS.port))
    except (RuntimeError, tf.errors.OpError) as error:
        raise InputError(f"--port={FLAGS.port} cannot be served ({error}): give one that no program uses") from None
    port = dispatcher.target.rpartition(":")[2]
    # Trainers also connect to the worker, at an address that the dispatcher gives them.
    worker = service.WorkerServer(
        service.WorkerConfig(dispatcher_address=f"localhost:{port}", worker_address=f"{FLAGS.host}:%port%")
    )
    command = as_started("launch/train")
    print(f"ready: {command} ... --data_service={FLAGS.host}:{port}", flush=True)
    worker.join()


def run() -> NoReturn:
    program.run(main, __doc__)


if __name__ == "__main__":
    run()
