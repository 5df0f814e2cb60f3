"""A run's directory: what may start in it, what is believed of it, and that a refusal leaves every byte as it was."""

import dataclasses
import errno
import fcntl
import json
import logging
import zipfile

import numpy as np
import pytest

from bn_keras import InputError
from bn_keras.networks.variants import VARIANTS
from bn_keras.paper.mnist_config import MnistConfig
from bn_keras.runs import checkpoint
from bn_keras.runs.run_config import MNIST_CONFIG_FILE, RunConfig
from bn_keras.runs.run_directory import RunDirectory, find_runs
from bn_keras.runs.run_files import seal

CLASSES = ["kite\nred", "a\u2028b", "back\\slash", "\\n", "c\rd", "", "\x85"]
CONFIG = RunConfig(
    variant=VARIANTS["bn_x5"],
    dataset="digits",
    dataset_fingerprint="f" * 64,
    train_examples=60,
    validation_examples=21,
    classes=len(CLASSES),
    channels=1,
    image_size=32,
    width=0.1,
    augmentation="none",
    bn_momentum=0.9,
    normalization_batch="32",
    batch_size=14,
    scale_learning_rate="linear",
    precision="float32",
    jit_compile=False,
    threads=1,
    ema=0.9,
    clip_norm=0.0,
    replicas=1,
    seed=0,
    steps=15,
    eval_every=8,
    eval_batch_size=8,
    log_every=2,
    checkpoint_every=3,
    population_statistics=0,
    monitor="",
    monitor_every=5,
)
ARRAYS = {"step": np.int64(3)}


def opened(path, config=CONFIG, classes=CLASSES):
    directory = RunDirectory(str(path))
    directory.open(config, classes)
    directory._lock.close()  # as when its process ends
    return directory


def with_checkpoint(path, step=3, config=CONFIG):
    directory = opened(path, config)
    checkpoint.save(str(path), step, ARRAYS, directory.texts)
    return directory


def write_model(path, step):
    with zipfile.ZipFile(path / "model.keras", "w") as archive:
        archive.writestr("weights", b"0123456789")
    seal(str(path / "model.keras"), step)


def contents(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file()}


def refusal(path, config=CONFIG, classes=CLASSES, allowed=frozenset(), directory=None):
    """What is said about a start, which leaves every byte."""
    before = contents(path)
    with pytest.raises(InputError) as caught:
        directory = directory or RunDirectory(str(path))
        directory.check(config, classes, allowed)
        directory.open(config, classes)
    assert contents(path) == before
    message = str(caught.value)
    assert "remove" not in message and "\n" not in message
    return message


@pytest.mark.parametrize("keep", ["classes.txt", "checkpoint"])
def test_the_names_of_classes_come_back_whatever_is_in_them(tmp_path, keep):
    (opened if keep == "classes.txt" else with_checkpoint)(tmp_path)
    if keep == "checkpoint":
        (tmp_path / "classes.txt").unlink()
    assert RunDirectory(str(tmp_path)).read_class_names() == CLASSES


def test_names_written_before_there_were_escapes_come_back(tmp_path):
    opened(tmp_path)
    old = ["beagle", "a\u2028b", "AC\\DC", "Saint Bernard, St Bernard", "e", "f", "g"]
    (tmp_path / "classes.txt").write_text("".join(f"{name}\n" for name in old))
    assert RunDirectory(str(tmp_path)).read_class_names() == old


@pytest.mark.parametrize("content", [b"a\nb\n", b"a\nb\nc\nd\ne\nf\ng", b"\xff\n" * 7], ids=["too few", "cut", "bytes"])
def test_names_that_are_not_those_of_the_network_are_refused(tmp_path, content):
    opened(tmp_path)
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(InputError, match=r"classes.txt .*: put a copy of it back"):
        RunDirectory(str(tmp_path)).read_class_names()


BROKEN = {
    "empty": b"",
    "cut": b'{"variant": "bn_x5", ',
    "another program's": b'{"name": "my experiment", "lr": 0.1}',
    "a list": b"[1, 2]",
    "not text": b"\xff\xfe",
    "a wrong type": json.dumps(CONFIG.flat() | {"image_size": "32"}).encode(),
    "a variant that is none": json.dumps({k: v for k, v in CONFIG.flat().items() if k != "dropout"})
    .encode()
    .replace(b"bn_x5", b"bn_x6"),
    "a value out of its range": json.dumps(CONFIG.flat() | {"image_size": 0}).encode(),
    "a value that is no choice": json.dumps(CONFIG.flat() | {"augmentation": "some"}).encode(),
    "NaN": json.dumps(CONFIG.flat() | {"width": float("nan")}).encode(),
    "a field too many": json.dumps(CONFIG.flat() | {"sharpness": 1}).encode(),
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_run_json_is_one_line_and_the_checkpoints_copy_is_taken(tmp_path, caplog, content):
    with_checkpoint(tmp_path)
    (tmp_path / "run.json").write_bytes(content)
    directory = RunDirectory(str(tmp_path))
    with caplog.at_level(logging.WARNING):
        directory.check(CONFIG, CLASSES)
    assert directory.read_config() == CONFIG
    assert len(caplog.messages) == 1 and str(tmp_path / "run.json") in caplog.text
    assert "the copy in the checkpoint of step 3 is taken" in caplog.text


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_run_json_without_a_copy_is_refused_and_left(tmp_path, content):
    opened(tmp_path)
    (tmp_path / "run.json").write_bytes(content)
    assert "put a copy of it back, or give another `directory`" in refusal(tmp_path)


def test_a_run_json_says_its_version_and_a_later_one_is_refused_by_name(tmp_path):
    assert json.loads(CONFIG.text())["version"] == 1
    content = CONFIG.text().replace('"version": 1', '"version": 2').encode()
    with pytest.raises(InputError, match=r"run\.json: \$\.version is 2, not a version .* at most 1: .*"):
        RunConfig.parse(content, "run.json")


def test_a_run_json_from_before_there_were_versions_is_read():
    assert RunConfig.parse(json.dumps(CONFIG.flat()).encode(), "run.json") == CONFIG


ARITHMETICS = {
    "none": (None, "without a number"),
    "an older one": (0, "0"),
    "a later one": (7, "7"),
    "the same": (2, None),
}


@pytest.mark.parametrize("begun, said", ARITHMETICS.values(), ids=ARITHMETICS)
def test_a_run_of_another_arithmetic_goes_on_and_says_that_its_last_bits_differ(tmp_path, caplog, begun, said):
    text = json.dumps(({} if begun is None else {"arithmetic": begun}) | CONFIG.flat())
    (tmp_path / "run.json").write_text(text)
    checkpoint.save(str(tmp_path), 3, ARRAYS, {"run.json": text})
    with caplog.at_level(logging.WARNING):
        directory = opened(tmp_path)
    assert json.loads(directory.texts["run.json"])["arithmetic"] == begun, "the number of its first steps is kept"
    line = f"{tmp_path} was begun with another arithmetic ({said}, now 2): from here on its weights may differ "
    assert [message.startswith(line) for message in caplog.messages] == [True] * bool(said)


def test_a_run_that_has_taken_no_step_has_this_versions_arithmetic(tmp_path, caplog):
    (tmp_path / "run.json").write_text(json.dumps(CONFIG.flat()))
    opened(tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["arithmetic"] == RunConfig.ARITHMETIC
    assert not caplog.messages


def test_a_missing_run_json_is_read_from_the_checkpoint(tmp_path):
    with_checkpoint(tmp_path)
    (tmp_path / "run.json").unlink()
    RunDirectory(str(tmp_path)).check(CONFIG, CLASSES)
    assert "seed 0 (now 1)" in refusal(tmp_path, dataclasses.replace(CONFIG, seed=1))
    assert [run.path for run in find_runs(str(tmp_path))] == [str(tmp_path)]


def test_the_checkpoint_is_believed_where_run_json_says_otherwise(tmp_path, caplog):
    """As after a change that was allowed, and a kill before the next checkpoint; or after a flipped bit."""
    with_checkpoint(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(CONFIG.flat() | {"image_size": 33, "steps": 20}))
    with caplog.at_level(logging.WARNING):
        assert RunDirectory(str(tmp_path)).read_config() == dataclasses.replace(CONFIG, steps=20)
    assert "image_size 33 (there 32)" in caplog.text


OTHERS = {
    "best": ("best-00000003.npz", b""),
    "curve": ("curve.jsonl", b"{}\n"),
    "model": ("model.keras", b"mine"),
    "classes": ("classes.txt", b"a\n"),
    "Section 4.1's": (MNIST_CONFIG_FILE, b"{}"),
}


@pytest.mark.parametrize("name, content", OTHERS.values(), ids=OTHERS)
def test_a_folder_of_something_else_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert f"{tmp_path} holds {name} but no run.json" in refusal(tmp_path)


def test_a_run_of_section_4_1_does_not_start_in_another_run(tmp_path):
    opened(tmp_path)
    message = refusal(tmp_path, directory=RunDirectory(str(tmp_path), MnistConfig))
    assert "holds run.json but no mnist.json" in message


def test_a_model_without_its_checkpoints_is_not_trained_over(tmp_path):
    opened(tmp_path)
    write_model(tmp_path, 15)
    assert "holds model.keras but no whole checkpoint" in refusal(tmp_path)


def test_checkpoints_of_which_none_is_whole_are_not_trained_over(tmp_path):
    with_checkpoint(tmp_path)
    (tmp_path / "checkpoint-00000003.npz").write_bytes(b"PK")
    assert "holds checkpoint-00000003.npz but no whole checkpoint" in refusal(tmp_path)


def test_a_start_that_a_kill_cut_short_goes_on(tmp_path):
    opened(tmp_path)
    (tmp_path / "classes.txt").unlink()
    (tmp_path / ".unfinished.txt").write_text("kit")
    opened(tmp_path)
    assert RunDirectory(str(tmp_path)).read_class_names() == CLASSES


def test_other_classes_are_refused_by_name(tmp_path):
    with_checkpoint(tmp_path)
    allowed = frozenset({"dataset_fingerprint"})
    config = dataclasses.replace(CONFIG, dataset_fingerprint="0" * 64)
    message = refusal(tmp_path, config, [*CLASSES[:-1], "poodle"], allowed)
    assert message.endswith("holds a run with a class '\\x85' (now 'poodle'): give another `directory`")


def changed(field):
    """The configuration with another value of a field, as --allow_change names it."""
    flat = CONFIG.flat()
    value = {
        "variant": "bn_baseline",
        "precision": "mixed_bfloat16",
        "activation": "sigmoid",
        "augmentation": "shift",
        "shuffling": "shard_order",
        "photometric_distortion": "full",
        "scale_learning_rate": "none",
        "distort_on": "device",
    }.get(field)
    if value is None:
        old = flat[field]
        value = (not old) if isinstance(old, bool) else old + 1 if isinstance(old, int) else old
        value = old / 2 + 0.1 if isinstance(old, float) else f"{old}1" if isinstance(old, str) else value
    return RunConfig.from_flat(flat | {field: value}, "")


SHAPES = {"width", "classes", "channels", "network", "depth", "separable_stem", "projection_4c_4d"}
NEVER = SHAPES | {"batch_normalization", "per_activation_modules", "dropout", "builder", "freeze"}
CADENCE = {name for name in CONFIG.flat() if name.endswith("_every")}
CADENCE |= {"steps", "population_statistics", "monitor", "pictures", "patience"}
IDENTITY = sorted(CONFIG.flat().keys() - CADENCE - {"eval_batch_size"})


@pytest.mark.parametrize("field", IDENTITY)
def test_what_is_advised_is_then_accepted_and_what_cannot_be_is_not_advised(tmp_path, field):
    with_checkpoint(tmp_path)
    config = changed(field)
    message = refusal(tmp_path, config, CLASSES if field != "classes" else [*CLASSES, "h"])
    assert f"{tmp_path} holds a run with {field} " in message and "give another `directory`" in message
    advised = message.partition("`allow_change=")[2].rstrip("`")
    assert (advised == field) == (field not in NEVER)
    if advised:
        RunDirectory(str(tmp_path)).check(config, CLASSES, frozenset({advised}))
    else:
        assert field in refusal(tmp_path, config, CLASSES, frozenset({field}))


def test_a_program_without_allow_change_does_not_advise_it(tmp_path):
    with_checkpoint(tmp_path)
    assert "allow_change" not in refusal(tmp_path, changed("seed"), allowed=None)


def test_another_process_that_trains_is_waited_for_by_nobody(tmp_path):
    first = RunDirectory(str(tmp_path))
    first.open(CONFIG, CLASSES)
    assert "another process is training" in refusal(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_the_reason_given(tmp_path, monkeypatch, number):
    def flock(file, operation):
        raise OSError(number, "no such thing here")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert "cannot be locked (no such thing here)" in refusal(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_another_process_made_meanwhile_is_not_written_over(tmp_path):
    directory = RunDirectory(str(tmp_path))
    directory.check(CONFIG, CLASSES, frozenset())
    with_checkpoint(tmp_path, config=changed("seed"))
    before = contents(tmp_path)
    with pytest.raises(InputError, match="holds a run with seed 1"):
        directory.open(CONFIG, CLASSES)
    assert contents(tmp_path) == before


def test_a_run_is_finished_by_its_checkpoint_and_the_model_of_that_step(tmp_path):
    def finished(steps):
        return RunDirectory(str(tmp_path)).finished(dataclasses.replace(CONFIG, steps=steps))

    with_checkpoint(tmp_path, step=3)
    row = {"kind": "validation", "step": 15, "examples": 210, "top1": 1, "top5": 1, "of": 21}
    (tmp_path / "curve.jsonl").write_text(json.dumps(row) + "\n")
    write_model(tmp_path, 3)
    assert finished(3) and not finished(15)
    checkpoint.save(str(tmp_path), 15, ARRAYS)
    assert not finished(15)  # the model is of step 3
    write_model(tmp_path, 15)
    assert finished(15) and finished(10) and not finished(16)
    (tmp_path / "model.keras").write_bytes(b"PK")
    assert not finished(15)


def test_a_run_that_diverged_has_nothing_to_do_until_something_is_changed(tmp_path):
    with_checkpoint(tmp_path)
    (tmp_path / "curve.jsonl").write_text('{"kind": "diverged", "step": 5, "reason": "the loss is not finite"}\n')
    directory = RunDirectory(str(tmp_path))
    assert directory.finished(CONFIG)
    assert not directory.finished(changed("learning_rate"))
