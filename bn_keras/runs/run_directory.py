"""The directory that holds everything about a run; standard library only.

    run.json               the configuration
    classes.txt            the name of every class, one a line
    curve.jsonl            loss, learning rate and accuracy by step
    checkpoint-*.npz       the last two checkpoints
    best-*.npz             the checkpoint of the best evaluation
    model.keras            the trained model
    events.out.tfevents.*  the curve for TensorBoard
    pictures/*.png         training images and worst mistakes at each evaluation, if the run is to draw them
    trackers.json          what experiment trackers were told

A run that is started in its existing directory continues, if its configuration is the same. Each checkpoint holds a
copy of the first two files, and that copy counts; the files are for people, and for a run without a checkpoint.

A directory may lie in a bucket. A bucket has no locks. If two processes of one configuration train there at once, they
write equal checkpoints.
"""

import errno
import fcntl
import functools
import io
import os
import re
import zipfile
from collections.abc import Collection, Sequence
from typing import Any, Generic, TypeVar, overload

from bn_keras import storage
from bn_keras.errors import InputError
from bn_keras.runs.run_config import MNIST_CONFIG_FILE, RunConfig
from bn_keras.runs.run_files import DamagedError, newest, note, read_sealed, replacing, signature, states
from bn_keras.runs.training_curve import FILE as CURVE_FILE
from bn_keras.runs.training_curve import TrainingCurve
from bn_keras.settings import RESTORE, Configuration, fields_of

CLASSES_FILE = "classes.txt"
MODEL_FILE = "model.keras"

Config = TypeVar("Config", bound=Configuration)


class RunDirectory(Generic[Config]):
    """The directory of one run. Only `open` writes.

    Args:
      path: the directory's path.
      configuration: the class of its configuration. `find_runs` finds only runs of the default class.
    """

    @overload
    def __init__(self: "RunDirectory[RunConfig]", path: str) -> None: ...

    @overload
    def __init__(self, path: str, configuration: type[Config]) -> None: ...

    def __init__(self, path: str, configuration: type[Any] = RunConfig):
        self.path = path
        self.config_path = os.path.join(path, configuration.FILE)
        self.model_path = os.path.join(path, MODEL_FILE)
        self.texts: dict[str, str] = {}
        self._configuration = configuration
        self._fields = fields_of(configuration)
        self._allowed: Collection[str] | None = None
        self._seen: tuple[Any, Any] = None, None

    @functools.cached_property
    def curve(self) -> TrainingCurve:
        return TrainingCurve(os.path.join(self.path, CURVE_FILE))

    def newest_step(self) -> int | None:
        """The step of the newest checkpoint that is whole; None if there is none."""
        state = self._newest()
        return state and state[0]

    def newest_state(self) -> tuple[int, bytes] | None:
        """(step, content) of the newest checkpoint that is whole, or None. After `check` it is in memory already."""
        if (state := self._newest(keep=True)) is None:
            return None
        return state[0], state[2]

    def forget_state(self) -> None:
        """Frees the memory that holds the newest checkpoint, which is as large as the network."""
        self._seen = None, None

    def _newest(self, keep=False):
        """(step, {name: text as bytes}, content) of the newest checkpoint that is whole, or None.

        It is read and checked once, as long as the directory has the same checkpoints.

        Args:
          keep: whether the content is wanted; if not, it may be None.
        """
        found = signature(self.path)
        seen, state = self._seen
        if seen != found or (keep and state and state[2] is None):
            state = newest(self.path, lambda content: (self._read_texts(content), content if keep else None))
            state = state and (state[0], *state[1])
            self._seen = found, state
        return state

    def _read_texts(self, content):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = {self._configuration.FILE, CLASSES_FILE} & set(archive.namelist())
            return {name: archive.read(name) for name in names}

    def model_step(self) -> int | None:
        """The step of `model.keras`; None if the file is missing, is damaged, or does not say it."""
        try:
            return read_sealed(self.model_path)[0]
        except FileNotFoundError:
            return None
        except DamagedError as error:
            note(f"{self.model_path} is damaged ({error})")
            return None

    def read_config(self, keep: bool = False) -> Config | None:
        """The run's configuration, from its newest checkpoint or else from `run.json`; None if there is no run.

        Args:
          keep: whether the run is about to continue: the checkpoint then stays in memory and is not read again.

        Raises:
          InputError: the file is damaged, and no whole checkpoint holds a copy.
        """
        return self._read_config(self._newest(keep))

    def _read_config(self, state):
        configuration = self._configuration
        copy = state and state[1].get(configuration.FILE)
        kept = configuration.parse(copy, self.config_path) if copy else None
        try:
            written = configuration.read(self.path)
        except FileNotFoundError:
            if kept:
                note(f"no {self.config_path}: the copy in the checkpoint of step {state[0]} is taken")
            return kept
        except InputError as error:
            if not kept:
                raise
            note(f"{str(error).removesuffix(RESTORE)}the copy in the checkpoint of step {state[0]} is taken")
            return kept
        if not kept:
            return written
        if changed := self._changes(kept, written):
            values = ", ".join(f"{name} {now} (there {before})" for name, (before, now) in changed.items())
            note(f"{self.config_path} differs from the checkpoint of step {state[0]}, which counts: {values}")
        free = {
            name: value for name, value in written.flat().items() if self._fields[name].setting.on_continuing == "free"
        }
        return configuration.from_flat(kept.flat() | free, self.config_path)

    def read_trained(self) -> Config:
        """The configuration of a run that has a checkpoint or a trained model.

        Raises:
          InputError: there is no run, or it has neither a whole checkpoint nor a model.
        """
        state = self._newest()
        config = self._read_config(state)
        if config is None:
            raise InputError(f"no run in {self.path}: train one with `launch/train --workdir={self.path}`")
        if state is None and storage.file_size(self.model_path) is None:
            raise InputError(
                f"no whole checkpoint and no {self.model_path}: it is written when training ends; "
                "continue it with `launch/train`"
            )
        return config

    def read_class_names(self) -> list[str]:
        """The name of each class, by index.

        Raises:
          InputError: neither the file nor a checkpoint's copy names as many classes as the network has.
        """
        path = os.path.join(self.path, CLASSES_FILE)
        state = self._newest()
        try:
            content = state[1][CLASSES_FILE] if state and CLASSES_FILE in state[1] else storage.read(path)
            names = _split_names(content.decode("utf-8"))
        except FileNotFoundError:
            raise InputError(f"no {path}: put a copy of it back, the name of every class, one a line") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is damaged ({error}): put a copy of it back") from None
        if len(names) != (classes := self._read_config(state).classes):
            raise InputError(f"{path} names {len(names)} classes, the network has {classes}: put a copy of it back")
        return names

    def check(self, config: Config, class_names: Sequence[str], allow_change: Collection[str] | None = None) -> None:
        """Refuses a run that cannot start or continue in the directory. A field that is None, not known yet, fits.

        Args:
          config: the configuration of the run to start.
          class_names: the classes of its data set.
          allow_change: fields that may differ nevertheless; None if the program has no such argument.

        Raises:
          InputError: the directory holds another run (every field that differs is named with both values), files of
            something else, or a run without a whole checkpoint.
        """
        if unknown := [name for name in allow_change or () if name not in self._fields]:
            fields = ", ".join(self._fields)
            raise InputError(f"`allow_change={unknown[0]}` is no field of a run: they are {fields}")
        self._allowed = allow_change
        self.__dict__.pop("curve", None)  # another process may have trained here since it was read
        state = self._newest(keep=True)
        found = self._read_config(state)
        if (state is None or found is None) and (lost := self._would_be_lost(found is None)):
            lacking = "no whole checkpoint to go on from" if found else f"no {self._configuration.FILE}"
            raise InputError(f"{self.path} holds {lost} but {lacking}: put a copy back, or give another `directory`")
        if found is None:
            return
        changed = self._changes(found, config)
        possible = {name for name in changed if self._fields[name].setting.may_change(*changed[name])}
        if refused := [name for name in changed if name not in possible & set(allow_change or ())]:
            differences = ", ".join(f"{name} {changed[name][0]} (now {changed[name][1]})" for name in refused)
            fix = "give another `directory`"
            if allow_change is not None and possible.issuperset(refused):
                allowed = ",".join([*sorted(allow_change), *refused])
                fix += f", or continue it all the same with `allow_change={allowed}`"
            raise InputError(f"{self.path} holds a run with {differences}: {fix}")
        if state and CLASSES_FILE in state[1]:
            known = _split_names(state[1][CLASSES_FILE].decode("utf-8"))
            if differing := [pair for pair in zip(known, class_names, strict=True) if pair[0] != pair[1]]:
                before, now = differing[0]
                raise InputError(
                    f"{self.path} holds a run with a class {before!r} (now {now!r}): give another `directory`"
                )

    def _would_be_lost(self, foreign):
        """The name of a file there that a new run would overwrite, or None."""
        names = [os.path.basename(path) for _, path in states(self.path)] + [MODEL_FILE]
        if foreign:
            names += [RunConfig.FILE, MNIST_CONFIG_FILE, CURVE_FILE, CLASSES_FILE]
        return next((name for name in names if storage.exists(os.path.join(self.path, name))), None)

    def _changes(self, found, config):
        """{name: (before, after)} of the fields that differ, but for those that a run is free to change."""
        before, after = found.flat(), config.flat()
        return {
            name: (before[name], after[name])
            for name, field in self._fields.items()
            if field.setting.on_continuing != "free" and after[name] not in (None, before[name])
        }

    def finished(self: "RunDirectory[RunConfig]", config: RunConfig) -> bool:
        """Whether nothing is left to do: the last step's model is there, or the run diverged and would do so again.

        The last step is `config.steps`, or an earlier step at which its patience ends.
        """
        state = self._newest()
        found = self._read_config(state)
        if found is None:
            return False
        if self.curve.diverged():
            return not self._changes(found, config)
        if state is None or not (state[0] >= config.steps or self.curve.stalled(config.patience, state[0])):
            return False
        return self.model_step() == state[0]

    def open(self, config: Config, class_names: Sequence[str]) -> None:
        """Makes the directory, locks it for this process, and writes the configuration and the names of the classes.

        Raises:
          InputError: as `check`, for what another process has written since; another process is training in the
            directory; or it cannot be locked.
        """
        self.check(config, class_names, self._allowed)
        storage.make_folder(self.path)
        if not storage.is_remote(self.path):  # buckets have no locks
            self._lock_directory()
        self.check(config, class_names, self._allowed)  # another process may have trained here in the meantime
        arithmetic = self._arithmetic_of_its_steps()
        if arithmetic != config.ARITHMETIC:
            before = "without a number" if arithmetic is None else arithmetic
            note(
                f"{self.path} was begun with another arithmetic ({before}, now {config.ARITHMETIC}): from here "
                "on its weights may differ in their last bits from those that the version which began it would give"
            )
        self.texts = {
            os.path.basename(self.config_path): config.text(arithmetic),
            CLASSES_FILE: "".join(f"{_escape(name)}\n" for name in class_names),
        }
        for name, text in self.texts.items():  # the configuration first: a folder without it is not a run
            with (
                replacing(os.path.join(self.path, name)) as temporary,
                open(temporary, "w", encoding="utf-8", newline="\n") as file,
            ):
                file.write(text)

    def _arithmetic_of_its_steps(self):
        """The number of the arithmetic that the run was begun with; None if it was begun before there were numbers."""
        if (state := self._newest()) is None:
            return self._configuration.ARITHMETIC
        copy = state[1].get(self._configuration.FILE)
        return copy and self._configuration.arithmetic(copy, self.config_path)

    def _lock_directory(self):
        path = os.path.join(self.path, ".lock")
        new = not os.path.exists(path)
        self._lock = open(path, "a")  # noqa: SIM115 (held until the process ends)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise InputError(
                    f"another process is training in {self.path}: wait for it, or give another `directory`"
                ) from None
            if new:
                os.remove(path)
            raise InputError(
                f"{self.path} cannot be locked ({error.strerror}), so two programs could train there at once: "
                "give a `directory` on a file system that has locks"
            ) from None


_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}


def _escape(name):
    """A name on one line: line ends and backslashes are written as escapes."""
    return re.sub(r"[\\\n\r]", lambda found: _ESCAPES[found[0]], name)


def _split_names(text):
    unescaped = {escape: name for name, escape in _ESCAPES.items()}
    return [re.sub(r"\\[\\nr]", lambda found: unescaped[found[0]], line) for line in text.split("\n")[:-1]]


def find_runs(root: str) -> list[RunDirectory[RunConfig]]:
    """Every run in `root` or below it, by path.

    Raises:
      InputError: there is none.
    """
    found = {
        os.path.dirname(path)
        for path in storage.find(root)
        if re.fullmatch(rf"{re.escape(RunConfig.FILE)}|checkpoint-.*\.npz", os.path.basename(path))
    }
    runs = [run for run in map(RunDirectory, sorted(found)) if run.read_config() is not None]
    if not runs:
        raise InputError(f"no runs in {root}: train one with `launch/train --variant=bn_x5 --workdir={root}/bn_x5`")
    return runs
