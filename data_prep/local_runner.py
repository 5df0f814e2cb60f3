"""Writes shards in processes on this machine."""

import concurrent.futures
import contextlib
import multiprocessing
import os
from collections.abc import Iterator

from data_prep import shard, signals
from data_prep.errors import InputError
from data_prep.progress import Counters, Progress
from data_prep.shard import ShardTask

Pool = concurrent.futures.ProcessPoolExecutor

_counters: Counters  # shared with the process that started this worker


@contextlib.contextmanager
def pool(workers: int, counters: Counters) -> Iterator[Pool | None]:
    """Local worker processes, which start with the first task; None for one worker: this process does the work."""
    if workers == 1:
        yield None
        return
    processes = Pool(workers, _process_context(), _start_worker, (counters,))
    try:
        yield processes
    except concurrent.futures.BrokenExecutor:
        raise InputError("a worker process died (out of memory?); run again, with fewer --workers") from None
    finally:
        processes.shutdown(cancel_futures=True)


def start(processes: Pool | None) -> None:
    """Starts the workers early, so that they load numpy while the plan is made."""
    if processes:
        with signals.blocked():
            processes.submit(int)


def run(tasks: list[ShardTask], processes: Pool | None, progress: Progress) -> None:
    """Writes all shards, in the pool's processes or in this one."""
    if processes is None:

        def count(*amounts: int) -> None:
            progress.counters.add(*amounts)
            progress.tick()

        for task in tasks:
            shard.write(task, count)
        return
    with signals.blocked():
        pending = {processes.submit(_write_in_worker, task) for task in tasks}
    while pending:
        done, pending = concurrent.futures.wait(pending, 0.25, concurrent.futures.FIRST_COMPLETED)
        progress.tick()
        for future in done:
            future.result()


def _start_worker(counters: Counters) -> None:
    """Prepares a worker process."""
    import jsonschema  # noqa: F401 - 0.1 s each, which the plan and `data_prep.formats.jpeg` would need at the first image
    import numpy  # noqa: F401

    global _counters
    _counters = counters
    signals.start_worker()


def _process_context() -> multiprocessing.context.BaseContext:
    """How to start workers: by fork, which is 0.2 s faster, unless there are other threads (fsspec, TensorFlow)."""
    alone = os.path.isdir("/proc/self/task") and len(os.listdir("/proc/self/task")) == 1
    return multiprocessing.get_context("fork" if alone else "spawn")


def _write_in_worker(task: ShardTask) -> None:
    shard.write(task, _counters.add)
