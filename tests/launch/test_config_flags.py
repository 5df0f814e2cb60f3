"""A field of a run's configuration is said once: it is a flag, stands in run.json, is kept, and is shown."""

import dataclasses
import json

import pytest
from absl import flags
from conftest import make_run_config

from bn_keras import VARIANTS, InputError
from bn_keras.runs.run_config import RunConfig
from bn_keras.runs.run_directory import RunDirectory
from bn_keras.settings import fields_of, setting
from launch import config_flags
from launch.program import as_flags

CLASSES = ["circle", "square", "stripe"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothedConfig(RunConfig):
    """A copy of the configuration with one field more."""

    sharpening: float = setting("Share of a label that all classes have.", 0.1, low=0.0, high=0.5)


def smoothed(**changes):
    return SmoothedConfig(
        **{f.name: getattr(make_run_config(), f.name) for f in dataclasses.fields(RunConfig)} | changes
    )


def parsed(configuration, *arguments):
    values = flags.FlagValues()
    config_flags.define(configuration, flag_values=values)
    values(["train", "--variant=bn_x5", *arguments])
    return values


def test_a_field_is_a_flag_with_its_help_default_and_bounds():
    values = parsed(SmoothedConfig, "--sharpening=0.2")
    assert config_flags.given(SmoothedConfig, flag_values=values) == {"sharpening": 0.2}
    help = " ".join(values.get_help().split())
    assert "--sharpening: Share of a label that all classes have. Default: 0.1." in help
    assert "(a number in the range [0.0, 0.5])" in help
    with pytest.raises(
        flags.IllegalFlagValueError, match=r"--sharpening=0\.6: 0\.6 is not a number in the range \[0\.0, 0\.5\]"
    ):
        parsed(SmoothedConfig, "--sharpening=0.6")


def test_a_field_stands_in_run_json_within_its_bounds_and_an_older_file_has_its_default(tmp_path):
    config = smoothed(sharpening=0.3)
    RunDirectory(str(tmp_path), SmoothedConfig).open(config, CLASSES)
    written = json.loads((tmp_path / "run.json").read_text())
    assert written["sharpening"] == 0.3
    assert SmoothedConfig.read(str(tmp_path)) == config
    (tmp_path / "run.json").write_text(json.dumps(written | {"sharpening": 0.6}))
    with pytest.raises(InputError, match=r"\$\.sharpening is 0\.6, not at least 0 and at most 0\.5"):
        SmoothedConfig.read(str(tmp_path))
    del written["sharpening"]
    (tmp_path / "run.json").write_text(json.dumps(written))
    assert SmoothedConfig.read(str(tmp_path)).sharpening == 0.1


def test_a_field_that_changes_is_refused_by_name_and_may_be_allowed(tmp_path):
    RunDirectory(str(tmp_path), SmoothedConfig).open(smoothed(), CLASSES)
    directory = RunDirectory(str(tmp_path), SmoothedConfig)
    with pytest.raises(InputError, match=r"holds a run with sharpening 0\.1 \(now 0\.2\).*allow_change=sharpening"):
        directory.check(smoothed(sharpening=0.2), CLASSES, [])
    directory.check(smoothed(sharpening=0.2), CLASSES, ["sharpening"])


def test_a_field_out_of_its_bounds_is_refused_in_python_too():
    with pytest.raises(InputError, match=r"`sharpening=0\.7` cannot work: it must be at least 0 and at most 0\.5"):
        smoothed(sharpening=0.7).check()


def test_a_field_is_in_tensorboards_tables(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from tensorboard.util.tensor_util import make_ndarray

    from bn_keras.training.tensorboard import TensorBoardWriter

    TensorBoardWriter(str(tmp_path), smoothed(sharpening=0.25).flat(), []).close()
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = {tag: events.SummaryMetadata(tag).plugin_data for tag in events.Tags()["tensors"]}
    (text,) = (tag for tag, data in tags.items() if data.plugin_name == "text")
    assert "| sharpening | 0.25 |" in make_ndarray(events.Tensors(text)[0].tensor_proto).item().decode()
    tables = [HParamsPluginData.FromString(data.content) for data in tags.values() if data.plugin_name == "hparams"]
    (session,) = (table.session_start_info for table in tables if table.HasField("session_start_info"))
    (column,) = (name for name in session.hparams if name.endswith("sharpening"))
    assert session.hparams[column].number_value == 0.25


@pytest.mark.parametrize("name", [name for name, field in fields_of(RunConfig).items() if field.setting.given])
def test_every_field_that_a_person_gives_is_a_flag_of_its_type(name):
    field = fields_of(RunConfig)[name]
    flag = parsed(RunConfig)[name]
    assert flag.flag_type() in {int: "int", float: "float", bool: "bool", str: "string enum"}[field.type]
    assert field.setting.help in flag.help


@pytest.mark.parametrize(
    "changes",
    [{}, {"variant": dataclasses.replace(VARIANTS["inception"], dropout=0.3)}, {"replicas": None},
     {"variant": dataclasses.replace(VARIANTS["bn_x5"], name="mine", title="mine", steps=0, learning_rate=1.0)}],
    ids=["plain", "a row that was changed", "devices not counted", "a row of one's own"],
)  # fmt: skip
def test_a_configuration_comes_back_from_what_was_written(tmp_path, changes):
    config = make_run_config(**changes)
    (tmp_path / "run.json").write_text(json.dumps(config.flat()))
    assert RunConfig.read(str(tmp_path)) == config


def test_what_the_library_says_of_arguments_a_launcher_says_of_flags(monkeypatch):
    values = parsed(RunConfig)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    said = (
        "`batch_size=1`, `deterministic=False`, `jit_compile` or `directory`: not `other=2`, `python -m x --batch_size`"
    )
    assert as_flags(said) == (
        "--batch_size=1, --nodeterministic, --jit_compile or --workdir: not `other=2`, `python -m x --batch_size`"
    )
