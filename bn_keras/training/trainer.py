"""Trains one run: steps, evaluation, checkpoints, exact resume, divergence.

All that a run does depends only on (seed, step, replica). A checkpoint holds the values of the variables at a step. To
resume, a run restores them, drops the curve after that step, and starts the input there. The result is bit for bit that
of a run that was never interrupted.

Several worker processes all run this program, each on its share of every mini-batch. All restore from the run's
directory, which they share; the chief writes it.
"""

import dataclasses
import enum
import functools
import math
import signal
from collections.abc import Collection

import tensorflow as tf

from bn_keras import population_statistics, storage
from bn_keras.errors import InputError, LostWorkerError, first_line
from bn_keras.evaluation.accuracy import Evaluator
from bn_keras.evaluation.trained_network import Network, network_of
from bn_keras.input.bad_records import SkippedRecords
from bn_keras.input.dataset import Dataset
from bn_keras.input.run_batches import RunBatches
from bn_keras.runs import checkpoint
from bn_keras.runs.run_config import RunConfig
from bn_keras.runs.run_directory import RunDirectory
from bn_keras.runs.run_files import note
from bn_keras.training.activation_monitor import PERCENTILES, Monitor
from bn_keras.training.distribution import Agreement, distribute, is_chief, make_strategy, uses_gpus
from bn_keras.training.fine_tuning import read_weights, take_over
from bn_keras.training.interruption import Interruption
from bn_keras.training.learning_rate import learning_rate
from bn_keras.training.pictures import Pictures
from bn_keras.training.process_settings import limit_threads, process_settings
from bn_keras.training.run_writer import RunRecord
from bn_keras.training.step_statistics import StepStatistics
from bn_keras.training.training_state import TrainingState, make_train_steps


class Outcome(enum.Enum):
    """How `train` ended."""

    FINISHED = "finished"
    DIVERGED = "diverged"
    INTERRUPTED = "interrupted"
    PREEMPTED = "preempted"


def train(
    config: RunConfig,
    dataset: Dataset,
    directory: str | RunDirectory[RunConfig],
    strategy: tf.distribute.Strategy | None = None,
    *,
    network: Network | None = None,
    allow_change: Collection[str] | None = None,
    skipped: SkippedRecords | None = None,
    data_service: str | None = None,
    profiled_steps: range = range(0),
    trackers: Collection[str] = (),
) -> Outcome:
    """Trains a run in `directory`, from its newest checkpoint, if there is one, to the end of its steps or patience.

    It returns when all steps are done, when the run has diverged (the last row of the curve then says so), or after a
    SIGINT or SIGTERM. Settings of the process that it changes, such as seeds and signal handlers, are put back. The
    threads of an operation are not: TensorFlow lets them be set only once, and a line says so when it is too late.

    Args:
      config: the result of `make_config`.
      dataset: the result of `read_dataset`.
      directory: a new directory, or that of the same run, which continues.
      strategy: the result of `make_strategy`; by default all GPUs, or the CPU.
      network: a function from the configuration to a network of your own, from images float32
        `[N, image_size, image_size, channels]` in [-1, 1] to logits; its weights may have L2 regularizers. By default
        the variant's. The same function again continues the run.
      allow_change: fields of the configuration that may differ from those of the run that continues.
      skipped: takes note of each record that cannot be used, which is then left out; None: such a record is an error.
      data_service: as in `training_batches`.
      profiled_steps: the steps that TensorFlow's profiler records; the first step of a run is 1.
      trackers: the experiment trackers that follow the curve: "wandb", "mlflow".

    Raises:
      InputError: the directory holds another run, or another process trains in it; the devices cannot share the batch;
        a record is damaged; or files cannot be written (the last checkpoint then stays whole).
      LostWorkerError: another worker is gone.
    """
    limit_threads(config.threads)
    strategy = strategy or make_strategy("auto")
    directory = RunDirectory(directory) if isinstance(directory, str) else directory
    config = config.on_devices(strategy.num_replicas_in_sync, uses_gpus(strategy))
    if network:
        config = dataclasses.replace(config, builder=network.__qualname__)
    directory.check(config, dataset.class_names, allow_change)
    batches = RunBatches(config, dataset, skipped, data_service)
    try:
        with process_settings(config, strategy), Interruption() as interruption:
            trainer = Trainer(
                batches, directory, strategy, interruption, profiled_steps, network or network_of, trackers
            )
            return trainer.run()
    except OSError as error:
        newest = directory.newest_step()
        whole = "no checkpoint was written" if newest is None else f"the checkpoint of step {newest} is whole"
        raise InputError(
            f"cannot write to {directory.path} ({error.strerror or error}): {whole}, the same command continues there"
        ) from error
    except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError) as error:
        raise LostWorkerError(
            f"lost another worker ({first_line(error)}): start all of them again, the same command continues"
        ) from error


class Trainer:
    """One run in one process. `run` is the loop; each of its methods is one thing that the loop does."""

    def __init__(
        self,
        batches: RunBatches,
        directory: RunDirectory[RunConfig],
        strategy: tf.distribute.Strategy,
        interruption: Interruption,
        profiled_steps: range,
        network: Network,
        trackers: Collection[str],
    ):
        self.config = config = batches.config
        self.batches_of_run = batches
        self.strategy = strategy
        self.state = TrainingState(config, strategy, network)
        self.agreement = Agreement(strategy)
        if config.initial_weights and directory.newest_step() is None:
            note(take_over(self.state.model, read_weights(config.initial_weights), config.initial_weights))
            self.state.optimizer.begin_averages()
        # The state is restored twice. Here a checkpoint that does not fit is an error before anything is written. After
        # `open` it is restored again, because until then another process may have trained in the directory.
        self.step = self._restore(directory)
        self.monitor = self._make_monitor() if config.monitor else None
        if config.pictures and self.agreement.workers > 1:
            raise InputError(f"`pictures={config.pictures}`: several workers cannot draw them; leave it out")
        self.pictures = Pictures(self.state.model, batches) if config.pictures else None
        if is_chief(strategy):
            directory.open(config, batches.dataset.class_names)
        self.step = self._restore(directory)
        directory.forget_state()
        self.record = RunRecord(config, directory, self.step, is_chief(strategy), batches.skipped, trackers)
        self.curve = directory.curve
        self.statistics = StepStatistics(strategy.num_replicas_in_sync)
        self.train_steps = make_train_steps(self.state, config, strategy)
        self.evaluator = Evaluator(self.state.model, strategy)
        self.batches = iter(distribute(strategy, functools.partial(batches.training, self._examples())))
        self.validation = distribute(strategy, batches.evaluation)
        self.interruption = interruption
        self.profiler = Profiler(directory.path, profiled_steps)
        self.profiler.at(self.step)
        self.steps_per_second = 0.0
        self.stopping = False

    def run(self) -> Outcome:
        """Takes the remaining steps, and after each does what is due."""
        try:
            self._evaluate_if_due()  # an interruption may have cut an evaluation short
            while self.step < self.config.steps and not self._stalled():
                self._advance()
                self.interruption.take_over()  # before the first step there is nothing to save
                if problem := self._problem():
                    return self._diverge(*problem)
                if self._due(self.config.log_every):
                    self._log()
                self._evaluate_if_due()
                if self._due(self.config.checkpoint_every):
                    self._save()
                if self.stopping and self.step < self.config.steps:
                    raise _Stopped
        except _Stopped:
            self._save()
            self.record.close(f"interrupted at step {self.step}; the same command continues")
            return Outcome.INTERRUPTED if self.interruption.signal == signal.SIGINT else Outcome.PREEMPTED
        finally:
            self.profiler.close()
        if stalled := self._stalled():
            self._save()
        self.record.save_model(self.step, self.state.model, self._best_step())
        self.record.close(f"finished at step {self.step}: {stalled}" if stalled else "finished")
        return Outcome.FINISHED

    def _stalled(self):
        return self.curve.stalled(self.config.patience, self.step)

    def _restore(self, directory):
        if saved := directory.newest_state():
            self.state.restore(checkpoint.arrays_of(saved[1]))
        step = int(self.state.step.numpy())
        if best := directory.curve.best(step):  # after a kill, the checkpoint may not know of this evaluation
            self.state.note_accuracy(*best)
        if (mean := self.agreement.mean(step)[0]) != step:
            raise InputError(
                f"this worker goes on at step {step}, the mean of all is {mean:g}: give all of them one `directory`, "
                "in a folder that they share"
            )
        return step

    def _advance(self):
        """Takes steps until something is due, but for about one second at most, so that a signal is seen soon."""
        cadences = [self.config.log_every, self.config.eval_every, self.config.checkpoint_every]
        if self.monitor:
            cadences.append(self.config.monitor_every)
        due = min(self.config.steps, *(self.step // every * every + every for every in cadences))
        due = min(due, self.profiler.next_change(self.step))
        count = min(due - self.step, max(1, int(self.steps_per_second)))
        with self.batches_of_run.naming_damage("train"):
            times = self.train_steps(self.batches, tf.constant(count)).numpy()
        self.step = int(self.state.step.numpy())
        self.profiler.at(self.step)
        self.statistics.add(times, self.config.batch_size)
        seconds, stopping = self.agreement.mean(times[:, 1].sum(), self.interruption.signal is not None)
        self.steps_per_second = count / seconds
        self.stopping = stopping > 0
        self.record.progressed(self.step)

    def _problem(self):
        """(step, reason) if the run has diverged, or None. Weights are checked before anything is saved."""
        if step := int(self.state.first_bad_step.numpy()):
            return step, "the loss is not finite"
        kept = self._due(self.config.log_every) or self._due(self.config.checkpoint_every) or self.stopping
        if (kept or self._due(self.config.eval_every)) and not self.state.finite():
            return self.step, "a weight is not finite"
        return None

    def _diverge(self, step, reason):
        examples = self._examples() - (self.step - step) * self.config.batch_size
        self.record.add("diverged", step, examples, reason=reason)
        self.record.close(f"diverged at step {step}: {reason}")
        return Outcome.DIVERGED

    def _log(self):
        """Adds the row of the steps since the last row."""
        examples = int(self.state.row_examples.numpy())
        before = self.state.examples - self.config.batch_size
        self._add_row(
            "training",
            learning_rate=float(learning_rate(self.config, before)),  # of the row's last step
            loss=float(self.state.loss_sum.numpy()) / examples,
            accuracy=int(self.state.correct.numpy()) / examples,
            **self.statistics.take(),
        )
        for counted in (self.state.row_examples, self.state.loss_sum, self.state.correct):
            counted.assign(tf.zeros_like(counted))

    def _evaluate_if_due(self):
        """Adds the rows of evaluations that are due at this step and not there yet."""
        if self._lacks("validation", self.config.eval_every):
            counts = self._count()
            accuracy = counts.top1 / counts.of
            self._draw_pictures()
            if self.state.note_accuracy(self.step, accuracy):
                self.record.save_best(self.step, self.state.arrays())
            self._add_row("validation", **counts._asdict())  # last of all: it says that the evaluation is done
            self.record.evaluated(self.step, accuracy)
        if self.config.ema and self._lacks("ema", self.config.eval_every):
            with self.state.optimizer.averages_applied():
                self._add_row("ema", **self._count()._asdict())
        if self.config.population_statistics and self._lacks("population", self.config.eval_every):
            with self._measured_statistics().applied():
                self._add_row("population", **self._count()._asdict())
        if self.monitor and self._lacks("monitor", self.config.monitor_every):
            self._add_row("monitor", percentiles=PERCENTILES, layers=self.monitor.look())

    def _draw_pictures(self):
        if self.pictures is None:
            return
        with self.batches_of_run.naming_damage("validation"):
            validation = self._until_interrupted(self.batches_of_run.evaluation())
            self.record.add_pictures(self.step, self.pictures.draw(self._examples(), validation))

    def _count(self):
        """Evaluates the validation examples."""
        with self.batches_of_run.naming_damage("validation"):
            return self.evaluator(self._until_interrupted(self.validation))

    def _measured_statistics(self):
        """Algorithm 2's statistics over the next training mini-batches, which an iterator of their own reads."""
        batches = self.batches_of_run.training(self._examples(), distort_on="host")
        steps = self.config.population_statistics
        return population_statistics(self.state.model, self._until_interrupted(batches), steps=steps, write=False)

    def _until_interrupted(self, batches):
        """The batches, but stops the run at a signal: an evaluation takes minutes, and a preemption leaves seconds.

        Several workers do not stop in an evaluation, as all have to take part in every batch.
        """
        for batch in batches:
            if self.agreement.workers == 1 and self.interruption.signal:
                raise _Stopped
            yield batch

    def _save(self):
        self.record.save(self.step, self.state.arrays(), self._best_step())

    def _best_step(self):
        return int(self.state.best_step.numpy())

    def _due(self, every):
        return self.step % every == 0 or self.step >= self.config.steps

    def _lacks(self, kind, every):
        return self.step > 0 and self._due(every) and self.step not in self.record.steps_of(kind)

    def _add_row(self, kind, **fields):
        self.record.add(kind, self.step, self._examples(), **fields)

    def _examples(self):
        return int(self.state.examples.numpy())

    def _make_monitor(self):
        images, _ = next(iter(self.batches_of_run.evaluation()))
        return Monitor(self.state.model, self.config.monitor, images)


class _Stopped(Exception):  # noqa: N818 (not an error)
    """A signal has asked the run to save and stop."""


class Profiler:
    """Runs TensorFlow's profiler during some steps; TensorBoard's page PROFILE shows its trace.

    Args:
      directory: the run's directory, for the trace.
      steps: the steps to record, as far as the run takes them.
    """

    def __init__(self, directory: str, steps: range):
        self._outbox = storage.Outbox(directory)
        self._steps = steps
        self._running = self._ran = False

    def next_change(self, step: int) -> float:
        """The step after which the profiler starts or stops next; infinity if it does neither."""
        ends = (self._steps.start - 1, self._steps.stop - 1) if self._steps else ()
        return min((end for end in ends if end > step), default=math.inf)

    def at(self, step: int) -> None:
        """Starts or stops the profiler, if that is due between the steps `step` and `step` + 1."""
        if step + 1 in self._steps and not self._running:
            tf.profiler.experimental.start(self._outbox.path)
            self._running = self._ran = True
        elif step + 1 not in self._steps:
            self.stop()

    def close(self) -> None:
        """Stops the profiler; says so if nothing was recorded."""
        self.stop()
        if self._steps and not self._ran:
            note(f"the profiler recorded nothing: none of the steps {self._steps[0]} to {self._steps[-1]} was taken")

    def stop(self) -> None:
        """Stops the profiler, if it runs, and writes its trace."""
        if self._running:
            tf.profiler.experimental.stop()
            self._outbox.send()
            self._running = False
