"""A configuration whose fields define their own help, bounds, flags and files; standard library only.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class MyConfig(Configuration):
        batch_size: int = setting("Images of one step.", 32, low=1)

From this come the field's flag (`launch.config_flags`), its entry and schema in the configuration's JSON file, the
refusal when a run continues with another value, and its column in TensorBoard's table.
"""

import dataclasses
import json
import os
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, Literal, Self

from bn_keras.errors import InputError
from bn_keras.json_files import COUNT, NUMBER, TEXT, parse_json, read_bytes

RESTORE = "put a copy of it back, or give another `directory`"
"""What to do about a configuration file that cannot be read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What there is to know about one field.

    Attributes:
      help: one sentence, for `--help`.
      low, high: the least and the largest value.
      above, below: what the value must be greater, or less, than.
      choices: the values there are; None for any. A field whose type is a `Literal` has those of its type.
      given: whether a person chooses the value; if not, it is read from the data set or counted on the machine.
      on_continuing: whether a run may continue with another value. "kept": only if the person allows it by name;
        "free": yes, as it changes no weight; "never": no, as the weights would have other shapes.
      has_variables: whether a value makes the checkpoint hold variables. A run with such a value cannot continue from a
        checkpoint that lacks them.
      rows: a table, if the value is one of its rows, whose settings then count as fields of the configuration.
      network: the module of the only network that has the setting; None if all have it.
    """

    help: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: Collection[str] | None = None
    given: bool = True
    on_continuing: Literal["kept", "free", "never"] = "kept"
    has_variables: Callable[[Any], bool] = lambda value: False
    rows: Mapping[str, Any] | None = None
    network: str | None = None

    def may_change(self, before: Any, after: Any) -> bool:
        """Whether a run can continue from its checkpoint with the value `after`, if it is allowed to."""
        return self.on_continuing != "never" and (self.has_variables(before) or not self.has_variables(after))

    def range(self) -> str:
        """What the value must be, in words; "" if every value of its type is good."""
        if self.choices is not None:
            return f"one of {', '.join(map(str, self.choices))}"
        bounds = {"at least": self.low, "greater than": self.above, "at most": self.high, "less than": self.below}
        return " and ".join(f"{words} {bound:g}" for words, bound in bounds.items() if bound is not None)

    def allows(self, value: Any) -> bool:
        """Whether a value is good; None, a value that is not known yet, always is."""
        return value is None or (
            (self.choices is None or value in self.choices)
            and (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.high is None or value <= self.high)
            and (self.below is None or value < self.below)
        )


def setting(help: str, default: Any = dataclasses.MISSING, **options: Any) -> Any:
    """A field of a configuration or of a row; `options` are the attributes of `Setting`."""
    return dataclasses.field(default=default, metadata={"setting": Setting(help=help, **options)})


@dataclasses.dataclass(frozen=True)
class Field:
    """A field as flags and files see it: the settings of a row stand beside those of the configuration.

    Attributes:
      type: int, float, str or bool; str for a row, which is given by its name.
      default: the configuration's default; None if it has none.
      of_row: whether it is a field of a row.
      setting: everything else about the field.
    """

    type: type
    default: Any
    of_row: bool
    setting: Setting


def fields_of(configuration: type) -> dict[str, Field]:
    """Every setting of a dataclass by name, in the order of its file."""
    found = {}
    for field in dataclasses.fields(configuration):
        if its := field.metadata.get("setting"):
            kind: Any = field.type
            if isinstance(kind, types.UnionType):
                kind = next(each for each in typing.get_args(kind) if each is not type(None))
            if typing.get_origin(kind) is Literal:
                kind, its = str, dataclasses.replace(its, choices=typing.get_args(kind))
            default = None if field.default is dataclasses.MISSING else field.default
            found[field.name] = Field(str if its.rows else kind, default, False, its)
            if its.rows:
                found |= {name: dataclasses.replace(each, of_row=True) for name, each in fields_of(kind).items()}
    return found


_SCHEMAS: dict[type, dict[str, Any]] = {int: COUNT, float: NUMBER, str: TEXT, bool: {"type": "boolean"}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Configuration:
    """Base of the dataclasses of settings that are kept in a JSON file.

    Attributes:
      FILE: the file's name in a directory.
      VERSION: the version of the file's format. Earlier versions are read, and so is a file without a version.
      ARITHMETIC: a number that is raised whenever the same settings no longer give the same bits.
    """

    FILE: ClassVar[str]
    VERSION: ClassVar[int] = 1
    ARITHMETIC: ClassVar[int] = 2

    @classmethod
    def schema(cls) -> dict:
        """The file's JSON Schema. null is a value that is not known, as of a network that was trained elsewhere."""
        known = f"a version of this file that this program knows: at most {cls.VERSION}"
        properties = {
            "version": {"type": "integer", "minimum": 1, "maximum": cls.VERSION, "description": known},
            "arithmetic": {**COUNT, "type": ["integer", "null"]},
        }
        for name, field in fields_of(cls).items():
            its, schema = field.setting, _SCHEMAS[field.type]
            bounds = {
                "minimum": its.low,
                "exclusiveMinimum": its.above,
                "maximum": its.high,
                "exclusiveMaximum": its.below,
                "enum": [*its.choices, None] if its.choices else None,
                "description": its.range() or None,
            }
            bounds = {key: bound for key, bound in bounds.items() if bound is not None}
            properties[name] = {**schema, **bounds, "type": [schema["type"], "null"]}
        required = [field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    def flat(self) -> dict[str, Any]:
        """All fields as one flat dictionary of numbers, strings and truth values; `from_flat` gives them back."""
        flat = {}
        for field in dataclasses.fields(self):
            flat[field.name] = value = getattr(self, field.name)
            if field.metadata["setting"].rows:
                flat[field.name] = value.name
                flat |= {name: getattr(value, name) for name in fields_of(type(value))}
        return flat

    def text(self, arithmetic: int | None = ARITHMETIC) -> str:
        """The content of the file.

        Args:
          arithmetic: the number that was current when the configuration was first used; None if there was none yet.
        """
        return json.dumps({"version": self.VERSION, "arithmetic": arithmetic, **self.flat()}, indent=1)

    @classmethod
    def arithmetic(cls, content: bytes, path: str) -> int | None:
        """The number of the arithmetic that a file says; None where it says none.

        Raises:
          InputError: as `parse`.
        """
        return parse_json(content, path, cls.schema(), RESTORE).get("arithmetic")

    @classmethod
    def from_flat(cls, flat: dict[str, Any], path: str) -> Self:
        """The configuration that `flat` was made of; a field that it lacks, as an older file may, gets its default.

        Args:
          flat: values that fit the schema.
          path: the file they are from, for messages.

        Raises:
          InputError: the row is not in the table, and not all its fields are given.
        """
        values = {field.name: flat[field.name] for field in dataclasses.fields(cls) if field.name in flat}
        for field in dataclasses.fields(cls):
            if (rows := field.metadata["setting"].rows) is None:
                continue
            row: Any = field.type
            name, own = flat[field.name], {k: flat[k] for k in fields_of(row) if flat.get(k) is not None}
            if name in rows:
                values[field.name] = dataclasses.replace(rows[name], **own)
            elif missing := fields_of(row).keys() - own:
                raise InputError(
                    f"{path} has the {field.name} {name!r}, of which it lacks {sorted(missing)}: {RESTORE}"
                )
            else:  # a row that the person added
                values[field.name] = row.own(name, **own)
        return cls(**values)

    @classmethod
    def parse(cls, content: bytes, path: str) -> Self:
        """The configuration that a file holds.

        Raises:
          InputError: it is not one of this version.
        """
        return cls.from_flat(parse_json(content, path, cls.schema(), RESTORE), path)

    @classmethod
    def read(cls, directory: str) -> Self:
        """The configuration that was written into a directory.

        Raises:
          InputError: the file is not one of this version.
          OSError: it is missing or cannot be read.
        """
        path = os.path.join(directory, cls.FILE)
        return cls.parse(read_bytes(path, RESTORE), path)

    def check(self) -> None:
        """Refuses what cannot work.

        Raises:
          InputError: a value is outside of its range; names the argument.
        """
        flat = self.flat()
        for name, field in fields_of(type(self)).items():
            if not field.setting.allows(flat[name]):
                raise InputError(f"`{name}={flat[name]}` cannot work: it must be {field.setting.range()}")
